// Registers the ops' schemas with PyTorch.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(lora_ext, m) {
  for (const char* schema : lora_ext::schemas::kAll) m.def(schema);
}
