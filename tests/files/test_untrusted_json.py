"""Untrusted JSON: what is refused, the messages, and the cost."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import tracemalloc

import pytest

from lora_ext.files.untrusted_json import parse_json_object, read_json_object

pytestmark = pytest.mark.cpu_only("has no tensors")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"a": [1, -2.5, None, True, "\u00e9\u6f22\U0001f600"], "b": {"c": [[], {}]}},
        {"time_step_limit": [0.0, float("inf")]},  # as transformers writes it
        {"n": 10**99, "text": "\\ud800 in words", "long": "x" * 10**6},
    ],
)
def test_an_object_is_read(values, tmp_path):
    for ensure_ascii in (True, False):
        path = tmp_path / "x.json"
        path.write_text(json.dumps(values, ensure_ascii=ensure_ascii), encoding="utf-8")
        assert read_json_object(path, "test", 10**7) == values


WRONG = {
    "": "is not JSON",
    "{": "is not JSON",
    "[1]": "holds a list, want an object",
    "1": "holds a int, want an object",
    "null": "holds a NoneType, want an object",
    '{"a": 1, "b": {"c": 1, "c": 2}}': "is not JSON: the key 'c' occurs twice",
    '{"a": ' + "9" * 101 + "}": "a number has 101 digits, want at most 100",
    '{"a": -' + "9" * 100 + "}": "a number has 101 digits",
    '{"a": "\\ud800"}': r"has a string that is not Unicode: '\ud800'",
    '{"a": [["\\udfff"]]}': r"has a string that is not Unicode: '\udfff'",
    '{"\\ud800": 1}': r"has a string that is not Unicode: '\ud800'",
    '{"a": ' + "[" * 64 + "]" * 64 + "}": "more than 64 levels",
    '{"a": ' * 65 + "1" + "}" * 65: "more than 64 levels",
    '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}": "more than 64 levels",
    '{"a": "\n"}': "is not JSON",
    "\ufeff{}": "is not JSON",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=range(len(WRONG)))
def test_bad_json_is_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_json_object(path, "test", 10**7)
    text_of_error = str(caught.value)
    assert text_of_error.startswith(f"test: {path} ")
    assert message in text_of_error
    assert "\n" not in text_of_error
    assert len(text_of_error) < len(str(path)) + 300
    with pytest.raises(ValueError) as caught:
        parse_json_object(text, "some metadata")
    assert str(caught.value).startswith("some metadata ")


def test_the_largest_allowed_depth():
    assert parse_json_object('{"a": ' + "[" * 63 + "]" * 63 + "}", "x")


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "x.json"
    for raw in (b"\xff{}", b'{"a": "\xed\xa0\x80"}', b"\0" * 10):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"x\.json is not JSON"):
            read_json_object(path, "", 100)


def test_a_file_above_the_limit(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json_object(path, "test", 8) == {"a": 1}
    with pytest.raises(ValueError, match=r"test: .*x\.json is larger than 7 bytes"):
        read_json_object(path, "test", 7)
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "none", "test", 7)


def test_only_regular_files_are_opened_and_none_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        (tmp_path / "link").symlink_to(tmp_path / "pipe")
        kinds = {"pipe": "a pipe", "link": "a pipe", "socket": "a socket", ".": "a directory", "/dev/zero": "a device"}
        for name, kind in kinds.items():
            with pytest.raises(ValueError, match=f"test: .* is {kind}, want a regular file"):
                read_json_object(tmp_path / name, "test", 100)
    (tmp_path / "real").write_text("{}")
    (tmp_path / "link to it").symlink_to(tmp_path / "real")
    assert read_json_object(tmp_path / "link to it", "test", 100) == {}


def _cases(size: int) -> dict[str, str]:
    """Objects of about ``size`` bytes that are expensive to parse."""
    return {
        "lists": '{"a": [' + ",".join(["[]"] * (size // 3)) + "]}",
        "keys": "{" + ",".join(f'"{i:06}": 0' for i in range(size // 12)) + "}",
        "digits": '{"a": [' + ",".join(["9" * 99] * (size // 100)) + "]}",
        "one number": '{"a": ' + "9" * size + "}",
        "one key twice": '{"' + "x" * (size // 2) + '": 0, "' + "x" * (size // 2) + '": 0}',
        "escapes": '{"a": "' + "\\u00e9" * (size // 6) + '"}',
        "depth": '{"a": ' + "[" * (size // 2) + "]" * (size // 2) + "}",
    }


@pytest.mark.parametrize("name", _cases(100))
def test_a_file_of_a_megabyte_is_cheap(name):
    """Memory is bounded, and time grows with the size, not with its square."""
    seconds = []
    for size in (125_000, 1_000_000):
        text = _cases(size)[name]
        tracemalloc.start()
        begin = time.process_time()
        with contextlib.suppress(ValueError):
            parse_json_object(text, "x")
        seconds.append(time.process_time() - begin)
        assert tracemalloc.get_traced_memory()[1] < 100e6
        tracemalloc.stop()
    assert seconds[1] < 40 * (seconds[0] + 0.01)  # 8 times the size
