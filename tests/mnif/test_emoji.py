import io
import json
import re
import tarfile
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import sha512
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnif.data import emoji
from mnif.data.builtin import builtin_licence, twemoji_files, twemoji_group
from mnif.data.dataset import Split
from mnif.data.emoji import VENDORS, emoji_design
from mnif.data.images import ImageData, load_images
from mnif.signals.registry import detect_signal
from mnif.utils.errors import UserError

pytest.importorskip("resvg_py")

TONES = [f"1f3f{tone}" for tone in "bcdef"]
PEOPLE = {"person": ("1f9d1", "1f468", "1f469"), "child": ("1f9d2", "1f466", "1f467")}
DOING = {"run": "1f3c3", "walk": "1f6b6", "kneel": "1f9ce", "police": "1f46e", "elf": "1f9dd", "surf": "1f3c4"}
WORK = {"cook": "1f373", "judge": "2696-fe0f", "rocket": "1f680", "red hair": "1f9b0", "wheelchair": "1f9bd"}


@st.composite
def variants(draw: st.DrawFn) -> tuple[str, str]:
    """What Unicode's table of emoji sequences has for people, and what it depicts whoever does it."""
    tone = draw(st.sampled_from(["", *TONES]))
    toned = [tone] if tone else []
    facing = draw(st.sampled_from([[], ["200d", "27a1", "fe0f"]]))
    if draw(st.booleans()):
        doing = draw(st.sampled_from([*DOING]))
        gender = draw(st.sampled_from([[], ["200d", "2640", "fe0f"], ["200d", "2642", "fe0f"], ["200d", "2642"]]))
        return "-".join([DOING[doing], *toned, *gender, *facing]), doing
    work = draw(st.sampled_from([*WORK]))
    return "-".join([draw(st.sampled_from(PEOPLE["person"])), *toned, "200d", WORK[work], *facing]), work


@given(variants(), variants())
def test_two_emoji_are_one_design_where_they_differ_in_skin_tone_gender_and_facing(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    assert (emoji_design(one[0]) == emoji_design(other[0])) == (one[1] == other[1])


def test_every_spelling_of_people_together_is_one_design() -> None:
    for single, between in {
        "1f46b": "1f91d",
        "1f491": "2764-fe0f",
        "1f48f": "2764-200d-1f48b",
        "1f46f": "1f430",
    }.items():
        pairs = {
            emoji_design(f"{a}{tone}-200d-{between}-200d-{b}")
            for a in PEOPLE["person"]
            for b in PEOPLE["person"]
            for tone in ("", *(f"-{tone}" for tone in TONES))
        }
        assert pairs == {emoji_design(single)} == {single}
    families = {"1f46a", "1f468-200d-1f469-200d-1f466", "1f9d1-200d-1f9d2-200d-1f9d2", "1f469-1f3fd-200d-1f467-1f3fd"}
    assert len({emoji_design(family) for family in families}) == 1
    assert len({emoji_design(code) for code in ("1f385", "1f936", "1f936-1f3fb", "1f9d1-1f3fb-200d-1f384")}) == 1
    assert len({emoji_design(code) for code in ("1f91d", "1f91d-1f3fc", "1faf1-1f3fb-200d-1faf2-1f3ff")}) == 1


def test_what_stands_alone_keeps_its_design() -> None:
    alone = [
        "2640",
        "2642",
        "27a1",
        "1f3fb",
        "1f1e9-1f1ea",
        "1f1eb-1f1f7",
        "23-20e3",
        "31-20e3",
        "1f468",
        "1f466",
        "1f475",
    ]
    assert len({emoji_design(code) for code in alone}) == len(alone)
    assert emoji_design("1f3fb") == emoji_design("1f3ff")
    assert emoji_design("2764-fe0f") == "2764" != emoji_design("2764-fe0f-200d-1f525")


def square(colour: str, **box: int) -> dict[str, object]:
    return {"body": f'<rect width="8" height="8" fill="{colour}"/>', **box}


PACKAGES: dict[str, tuple[dict[str, object], dict[str, str]]] = {
    "noto": (
        {"cook": square("#f00"), "cook-dark": square("#fa0"), "star": square("#ff0"), "left": square("#123")},
        {"1f468-200d-1f373": "cook", "1f469-1f3ff-200d-1f373": "cook-dark", "2b50": "star"},
    ),
    "fluent": ({"star": square("#fe0")}, {"2b50": "star"}),
    "twemoji": (
        {"france": square("#00f"), "martin": square("#00f"), "cook": square("#e00"), "wide": square("#0f0", width=16)},
        {"1f1eb-1f1f7": "france", "1f1f2-1f1eb": "martin", "1f9d1-200d-1f373": "cook", "1f4cf": "wide"},
    ),
    "fxemoji": ({"whitemediumstar": square("#ee0"), "franceflag": square("#00e")}, {}),
    "emojione": ({"flag-for-st-martin": square("#00d")}, {}),
}
"""Small packages as iconify makes them: icons, and code points of those that have any."""


def tarball(contents: dict[str, object]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in contents.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


class Registry(BaseHTTPRequestHandler):
    files: ClassVar[dict[str, bytes]]
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.end_headers()
        with suppress(OSError):  # who asked has had enough
            self.wfile.write(content or b"")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Registry]]:
    """A registry on this machine with small packages of the five vendors, whose sizes and hashes are known."""
    Registry.files, Registry.asked = {}, []
    for vendor, (icons, codes) in PACKAGES.items():
        content = tarball({"chars.json": codes, "icons.json": {"icons": icons, "width": 8, "height": 8}})
        about = VENDORS[vendor]
        integrity = b64encode(sha512(content).digest()).decode()
        monkeypatch.setitem(VENDORS, vendor, replace(about, size=len(content), integrity=integrity))
        name = f"{about.package}-{about.version}.tgz"
        Registry.files[f"/mirror/@iconify-json/{about.package}/-/{name}"] = content
    table = tmp_path / "code_points.json"
    fxemoji = {"whitemediumstar": "2b50", "franceflag": "1f1eb-1f1f7"}
    table.write_text(json.dumps({"fxemoji": fxemoji, "emojione": {"flag-for-st-martin": "1f1f2-1f1eb"}}))
    monkeypatch.setattr(emoji, "_CODE_POINTS", table)
    monkeypatch.setenv("MNIF_CACHE", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/mirror/")
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield Registry
        server.shutdown()
        thread.join()


def test_emoji_are_drawn_once_and_named_after_vendor_and_code_points(
    registry: type[Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_images("emoji", 64, channels=4)
    assert data.ids == [
        *("noto-1f468-200d-1f373", "noto-1f469-1f3ff-200d-1f373", "noto-2b50", "fluent-2b50"),
        *("twemoji-1f1eb-1f1f7", "twemoji-1f9d1-200d-1f373", "twemoji-1f4cf"),  # of two flags that look the same, one
        *("fxemoji-2b50", "fxemoji-1f1eb-1f1f7", "emojione-1f1f2-1f1eb"),
    ]
    pictures = dict(zip(data.ids, data.images, strict=True))
    assert (pictures["noto-2b50"] == [255, 255, 0, 255]).all()
    wide = pictures["twemoji-1f4cf"]  # 16 by 8: its left half, in the middle of a square
    assert (wide[16:48, :32] == [0, 255, 0, 255]).all()
    assert not wide[:15].any()
    assert not wide[49:].any()
    assert not wide[:, 33:].any()
    assert len(registry.asked) == 5
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:1")
    monkeypatch.delattr(emoji, "_drawn")
    again = load_images("emoji", 64, channels=4)
    np.testing.assert_array_equal(again.images, data.images)


def test_no_design_stands_on_both_sides_whichever_vendor_draws_it(registry: type[Registry]) -> None:
    data = load_images("emoji", 8)
    group = dict(zip(data.ids, data.groups, strict=True))
    cooks = {group[id] for id in group if "1f373" in id}
    stars = {group[id] for id in group if "2b50" in id}
    # Twemoji draws two flags the same, so that both are one design in every hand.
    flags = {group[id] for id in group if id.endswith(("1f1eb-1f1f7", "1f1f2-1f1eb"))}
    assert [len(groups) for groups in (cooks, stars, flags)] == [1, 1, 1]
    assert len(cooks | stars | flags) == 3
    for vendor in VENDORS:
        one = load_images(f"emoji:{vendor}", 8)
        rows = [data.ids.index(id) for id in one.ids]
        assert one.ids == [id for id in data.ids if id.startswith(vendor)]
        np.testing.assert_array_equal(one.images, data.images[rows])
        np.testing.assert_array_equal(one.split(0.3, 0.2), data.split(0.3, 0.2)[rows])


def test_without_a_registry_one_line_says_what_to_put_where(
    registry: type[Registry], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:1")
    with pytest.raises(UserError) as caught:
        load_images("emoji:noto", 8)
    message, folder = str(caught.value), tmp_path / "cache/emoji"
    assert "\n" not in message
    for part in (
        f"is not at {folder}/noto-1.2.9.tgz",
        "http://127.0.0.1:1/@iconify-json/noto/-/noto-1.2.9.tgz",
        "cannot be downloaded ([Errno 111] Connection refused)",
    ):
        assert part in message
    assert not list(tmp_path.rglob("*.tgz*"))
    for path, content in registry.files.items():
        (folder / Path(path).name).write_bytes(content)
    assert len(load_images("emoji", 8)) == 10  # put there by hand


def test_a_package_with_another_content_is_refused_and_not_kept(registry: type[Registry], tmp_path: Path) -> None:
    path = next(path for path in registry.files if "twemoji" in path)
    right = registry.files[path]
    for wrong in (right[:-1], right[:-1] + b"x", right + b"x" * 10_000_000, b""):
        registry.files[path] = wrong
        with pytest.raises(
            UserError, match=r"http://.*/twemoji-1\.2\.5\.tgz: sha512 .* has .*choose another registry"
        ):
            load_images("emoji", 8)
        assert not list((tmp_path / "cache").rglob("*twemoji*"))
    registry.files[path] = right
    (tmp_path / "cache/emoji/twemoji-1.2.5.tgz").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"emoji/twemoji-1\.2\.5\.tgz: sha512 .*remove it"):
        load_images("emoji", 8)
    del registry.files[path]
    (tmp_path / "cache/emoji/twemoji-1.2.5.tgz").unlink()
    with pytest.raises(UserError, match=r"twemoji-1\.2\.5\.tgz .* cannot be downloaded \(Not Found\)"):
        load_images("emoji", 8)


def test_what_a_user_may_get_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MNIF_CACHE", str(tmp_path))
    assert detect_signal("emoji") == detect_signal("emoji:fluent") == "image"
    for source in ("emoji:apple", "emoji:", "emoji:noto:3"):
        with pytest.raises(
            UserError, match=f'{source}: no vendor ".*"; choose one of noto, fluent, twemoji, fxemoji, e'
        ):
            load_images(source, 8)
    for address in ("file:///etc", "registry", "https://", "https://me:secret@host/npm"):
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
        with pytest.raises(UserError, match="npm_config_registry: must be https://HOST") as caught:
            load_images("emoji", 8)
        assert "secret" not in str(caught.value)
    monkeypatch.setattr("mnif.utils.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'"resvg-py" is missing; run: pip install "mnif-diffusion\[emoji\]"'):
        load_images("emoji", 8)


def test_every_vendor_is_credited() -> None:
    licence, words = builtin_licence("emoji") or ("", "")
    assert licence == "other"
    assert words.count(";") == 4
    assert builtin_licence("emoji:fluent") == ("mit", "Fluent Emoji by Microsoft, MIT")
    attribution = (Path(emoji.__file__).parent / "files/EMOJI_ATTRIBUTION.md").read_text()
    for vendor in VENDORS.values():
        assert vendor.credit in words
        assert vendor.credit in attribution
        assert f"`{vendor.package}` {vendor.version}" in attribution


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MNIF_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            return {vendor: emoji._package(about.file) for vendor, about in VENDORS.items()}
        except UserError as error:
            pytest.skip(f"the npm registry cannot be reached: {error}")


def test_the_real_packages_tell_the_same_designs_by_name_as_by_code_point(packages: dict[str, Path]) -> None:
    counts, designs = {}, defaultdict(set)
    for vendor, package in packages.items():
        codes = emoji._code_points(vendor, package)
        counts[vendor] = len(codes)
        for code, name in codes.items():
            bare = re.sub(r"-(medium-dark|medium-light|dark|light|medium)(-skin-tone)?(?=-|$)", "", name)
            designs[re.sub("[^a-z0-9]", "", bare.replace("flag-for-", "flag-"))].add((emoji_design(code), vendor))
    assert counts == {"noto": 3729, "fluent": 3139, "twemoji": 3988, "fxemoji": 1034, "emojione": 1834}
    several = {name for name, found in designs.items() if len({design for design, _ in found}) > 1}
    # Firefox calls a face what others call the animal, and so on; "police-car-light" and "small" are no skin tones.
    firefox = {
        "cat",
        "construction",
        "dog",
        "kiss",
        "mouse",
        "pig",
        "star",
        "sunglasses",
        "tiger",
        "umbrella",
        "window",
    }
    assert several == firefox | {"blacksmallsquare", "whitesmallsquare", "policecar"}
    assert all(len({design for design, vendor in designs[name] if vendor != "fxemoji"}) == 1 for name in firefox)


def test_the_real_packages_are_drawn_with_transparency(packages: dict[str, Path]) -> None:
    for vendor, package in packages.items():
        names = list(emoji._code_points(vendor, package).values())[::400]
        drawings = np.stack(list(emoji._drawn(package, names)))
        assert drawings.shape == (len(names), 64, 64, 4)
        covered = (drawings[..., 3] > 0).mean(axis=(1, 2))
        assert (covered > 0.05).all()
        assert covered.min() < 0.95
        assert isinstance(ImageData(vendor, drawings, names, names), ImageData)


def test_how_many_designs_the_split_of_twemoji_leaks() -> None:
    """What docs/data.md says of it; the split itself stays, for the sake of earlier figures."""
    ids = list(twemoji_files())
    data = ImageData("twemoji", np.zeros((len(ids), 1, 1, 3), np.uint8), ids, [*map(twemoji_group, ids)])
    splits, designs = data.split(0.1, 0.05), np.array([*map(emoji_design, ids)])
    seen = np.isin(designs, designs[splits == Split.TRAIN])
    counted = {}
    for split in (Split.HELD_OUT, Split.TEST):
        part, leaked = splits == split, seen & (splits == split)
        groups = [len({data.groups[row] for row in np.flatnonzero(rows)}) for rows in (leaked, part)]
        counted[split] = (leaked.sum(), part.sum(), *groups)
    assert counted == {Split.HELD_OUT: (157, 355, 28, 186), Split.TEST: (80, 191, 15, 101)}
    regrouped = replace(data, groups=designs.tolist()).split(0.1, 0.05)
    assert not np.isin(designs[regrouped != Split.TRAIN], designs[regrouped == Split.TRAIN]).any()
