"""Changes the arguments of a valid call, which can make it invalid."""

from __future__ import annotations

from dataclasses import replace

from .choices import Choices
from .values import FILLS, FLOATING, KINDS, LAYOUTS, OTHER_DTYPES, OVERLAPS, ListValue, Source, TensorValue, Value

_SIZES = (0, 1, 2, 7, 33, 300, 1 << 31, 1 << 40, (1 << 62) + 1)
# Words are easier to read than a list with a line each.
_NUMBERS = (  # noqa: SIM905
    "0.0 -0.0 -1.0 1.0 0.9999999999999999 0.99999 2.0**-17 2.0**-18 5e-324 1e-30 3e38 1e308 float('inf') float('-inf') "
    "float('nan') True 1 2**70 torch.tensor(0.5) torch.tensor([0.5,0.5]) numpy.float32(0.5) 1j"
).split()
_INTEGERS = "0 1 -1 2**31 2**62 2**63-1 -(2**63) 2**63 2**70 1.0 1.5 True".split()  # noqa: SIM905
_OTHERS = (  # noqa: SIM905
    "None 'lora' 1 0.5 True -1 () [] {} '' object() torch.float32 numpy.zeros((2,2)) numpy.int64(3) b'\\x00' "
    "'\\ud800' 'a'*5000 [None] [[]] ['a',1] {'a':None} {'a'} iter('ab') float('nan') 2**70 -0.0 1e400 [2**70] type "
    "torch.zeros(2) torch.nn.Linear(2,2)"
).split()


def mutate(choices: Choices, arguments: dict[str, Value]) -> tuple[dict[str, Value], list[str]]:
    """Returns a copy of the arguments with one to three changes, and the names of the changed ones."""
    arguments, changed = dict(arguments), []
    for _ in range(choices.randint(1, 3)):
        if not arguments:
            break
        name = choices.choice(list(arguments))
        changed.append(name)
        if choices.chance(3):
            del arguments[name]
        elif choices.chance(12):
            other = choices.choice(list(arguments))
            changed.append(other)
            arguments[name] = _aliased(choices, arguments[name], other, arguments[other])
        else:
            arguments[name] = _mutated(choices, arguments[name], name)
    # An alias must come after its target.
    aliases = {name: value for name, value in arguments.items() if _alias_of(value)}
    plain = {name: value for name, value in arguments.items() if name not in aliases}
    kept = {name: value for name, value in aliases.items() if _alias_of(value) in plain}
    return {**plain, **kept}, changed


class Alias(Source):
    """Another argument, or a part of it."""

    def __init__(self, of: str, text: str):
        super().__init__(text)
        self.of = of


def _alias_of(value: Value) -> str:
    """Returns the argument that a value refers to, or ""."""
    if isinstance(value, Alias):
        return value.of
    return next(filter(None, map(_alias_of, value.entries)), "") if isinstance(value, ListValue) else ""


def _aliased(choices: Choices, value: Value, name: str, other: Value) -> Value:
    if isinstance(value, ListValue) and isinstance(other, ListValue) and value.entries and other.entries:
        entries, part = list(value.entries), f"{name}_{choices.randrange(len(other.entries))}"
        entries[choices.randrange(len(entries))] = Alias(name, choices.choice((part, f"{part}[:1]", f"{part}.T")))
        return ListValue(entries)
    return Alias(name, choices.choice((name, f"{name}[:1]", f"{name}[..., :1]", f"{name}.T", f"{name}[0]")))


def _mutated(choices: Choices, value: Value, name: str) -> Value:
    if isinstance(value, TensorValue):
        return _mutated_tensor(choices, value)
    if isinstance(value, ListValue):
        return _mutated_list(choices, value, name)
    is_number = value.text.lstrip("-")[:1].isdigit() or "float" in value.text or "torch." in value.text
    if choices.chance(25) or not is_number:
        return Source(choices.choice(_OTHERS))
    return Source(choices.choice(_INTEGERS if value.text.lstrip("-").isdigit() else _NUMBERS))


def _mutated_tensor(choices: Choices, value: TensorValue) -> Value:
    shape = list(value.shape)
    what = choices.randrange(9)
    if what == 0 and shape:  # another size
        at = choices.randrange(len(shape))
        shape[at] = choices.choice((max(shape[at] - 1, 0), shape[at] + 1, *_SIZES))
        return replace(value, shape=tuple(shape), steps=[])
    if what == 1:  # another number of dimensions
        at = choices.randrange(len(shape) + 1)
        if shape and choices.chance(50):
            del shape[min(at, len(shape) - 1)]
        else:
            shape.insert(at, choices.choice((1, 2, 0)))
        return replace(value, shape=tuple(shape), steps=[])
    if what == 2:
        return replace(value, dtype=choices.choice((*FLOATING, *OTHER_DTYPES)), steps=list(value.steps))
    if what in (3, 4):
        return replace(value, steps=[*value.steps, KINDS[choices.choice(list(KINDS))]])
    if what == 5:
        steps = {**LAYOUTS, **OVERLAPS}
        return replace(value, steps=[*value.steps, steps[choices.choice(list(steps))]])
    if what == 6:
        return replace(value, fill=choices.choice(FILLS), steps=list(value.steps))
    if what == 7:
        return replace(value, shape=tuple(choices.choice(_SIZES[:6]) for _ in range(choices.randrange(4))), steps=[])
    return Source(choices.choice(_OTHERS)) if choices.chance(50) else ListValue([value])


def _mutated_list(choices: Choices, value: ListValue, name: str) -> Value:
    entries = list(value.entries)
    what = choices.randrange(7)
    if what <= 2 and entries:
        at = choices.randrange(len(entries))
        entries[at] = _mutated(choices, entries[at], f"{name}_{at}")
    elif what == 3 and entries:
        del entries[choices.randrange(len(entries))]
    elif what == 4 and entries:
        entries.append(Source(f"{name}_{choices.randrange(len(entries))}"))  # the same tensor twice
    elif what == 5:
        entries = entries * choices.choice((0, 2, 9, 100))
    else:
        return Source(choices.choice(_OTHERS)) if not entries or choices.chance(50) else entries[0]
    return ListValue(entries)
