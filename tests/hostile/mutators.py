"""Small changes that damage a file, each a function of a seed: of bytes, and of values in JSON."""

import json
import random
from collections.abc import Iterator
from typing import Any

DIGITS = "9" * 5000


def damaged_bytes(content: bytes, seed: int) -> bytes:
    """Cuts off, flips, fills with zeros, doubles or empties some part of a file."""
    choice = random.Random(seed)
    place = choice.randrange(len(content))
    some = bytes(choice.randrange(256) for _ in range(choice.choice((1, 4, 64))))
    ways = (
        content[:place],
        content[:8],
        b"",
        content + some,
        content[:place] + some + content[place + len(some) :],
        content[:place] + bytes(len(some)) + content[place + len(some) :],
        content[:place] + content[place + len(some) :],
        content[: min(place, 200)] + some + content[min(place, 200) + len(some) :],  # headers come first
        content[place:] + content[:place],
        b"\xff" * len(content),
    )
    return ways[seed % len(ways)]


_WHOLE: tuple[bytes, ...] = (
    b"",
    b"null",
    b"[]",
    b"{}",
    b"3",
    b'"text"',
    b"[" * 100_000,
    b"[" * 40 + b"]" * 40,
    b"\xff\xfe{}",
    b'{"a": "\xff"}',
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b'{"a": "\\ud800"}',
    b'{"a": "' + b'\\"' * 10_000,
    b'{"a": ' + DIGITS.encode() + b"}",
)

# In the place of a value; a text that is no JSON of its own is put in as it stands.
_VALUES: tuple[str, ...] = (
    "null",
    "[]",
    "{}",
    "true",
    "-1",
    "0",
    "1e308",
    "-1e308",
    "1000000000",
    "9" * 30,
    DIGITS,
    "0.5",
    '"text"',
    '""',
    '"../../../etc/passwd"',
    '"a\\u0000b"',
    '"' + "x" * 100_000 + '"',
    "[null]",
    '[["a", 1], {"b": []}]',
    '{"a": {"b": [1, 2, {"c": null}]}}',
    "[" * 60 + "]" * 60,
    "NaN",
    "Infinity",
    "1e999",
)
_MARK = "@here@"


def damaged_json(content: bytes, seed: int) -> bytes:
    """Puts another value, or none, in the place of one in a JSON file; or damages the file as a whole."""
    choice = random.Random(seed)
    if seed % 5 == 0:
        return _WHOLE[seed // 5 % len(_WHOLE)]
    if seed % 5 == 1:
        return damaged_bytes(content, choice.randrange(1 << 30))
    value = json.loads(content)
    places = list(_places(value))
    holder, key = choice.choice(places)
    if seed % 10 == 2 and isinstance(holder, dict):
        if choice.random() < 0.5:
            del holder[key]
        else:
            holder[f"{key}x"] = holder.pop(key)
        return json.dumps(value).encode()
    new = choice.choice(_VALUES)
    if seed % 10 == 3 and isinstance(holder, dict):  # twice: the last one counts
        holder[_MARK] = holder[key]
        text = json.dumps(value)
        return text.replace(json.dumps(_MARK), json.dumps(key)).encode()
    holder[key] = _MARK
    return json.dumps(value).replace(json.dumps(_MARK), new).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everywhere a value stands, as what holds it and its key."""
    for key, each in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
        yield value, key
        if isinstance(each, dict | list):
            yield from _places(each)
