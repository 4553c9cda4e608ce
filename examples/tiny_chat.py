"""A chat model of a few thousand weights, its tokenizer and its data, for the examples of trainers.

The model is a Llama, made from its config, so that the examples run in seconds without a network. With a model of your
own, use `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` instead.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "sun": "yellow", "rose": "red"}
WORDS = ["<pad>", "<unk>", "<user>", "<assistant>", "<end>", "what", "colour", "is", "?", *COLOURS, *COLOURS.values()]
# The generation markers say which tokens are the assistant's: assistant_only_loss reads them.
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ '<assistant> ' }}{% generation %}{{ message.content + ' <end> ' }}{% endgeneration %}"
    "{% else %}{{ '<user> ' + message.content + ' <end> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)


def model():
    torch.manual_seed(0)  # the "pretrained" weights: the same ones every time
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tokens = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": WORDS.index("<end>"), "bos_token_id": None}
    sizes |= {"max_position_embeddings": 64, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens))


def question(thing):
    return [{"role": "user", "content": f"what colour is {thing} ?"}]


def answer(colour):
    return [{"role": "assistant", "content": colour}]


def answers(model):
    """What the model says about every thing."""
    words, said = tokenizer(), {}
    for thing in COLOURS:
        prompt = words.apply_chat_template(question(thing), add_generation_prompt=True, return_tensors="pt")
        out = model.eval().generate(**prompt, max_new_tokens=4, do_sample=False)
        said[thing] = words.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return said
