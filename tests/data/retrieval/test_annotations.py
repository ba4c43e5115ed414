"""Published annotation layouts, read from small files written by hand, and files that are none."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidtok.data.retrieval import READERS, load_pairs

JSON: Any = {
    "info": {"version": "1.0"},
    "videos": [
        {
            "video_id": "video0",
            "category": 9,
            "url": "u",
            "start time": 1.0,
            "end time": 2.0,
            "split": "train",
            "id": 0,
        },
        {"video_id": "video7", "category": 9, "url": "u", "start time": 1.0, "end time": 2.0, "split": "test", "id": 7},
    ],
    "sentences": [
        {"caption": "a car is  shown", "video_id": "video0", "sen_id": 0},
        {"caption": "a man drives", "video_id": "video7", "sen_id": 1},
        {"caption": "someone drives a car", "video_id": "video0", "sen_id": 2},
        {"caption": "left out", "video_id": "video8", "sen_id": 3},
    ],
}


def write(root: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".pkl"):
            path.write_bytes(pickle.dumps(content))
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return root


def videos(root: Path, *names: str) -> Path:
    return write(root / "videos", dict.fromkeys(names, b"x"))


def msrvtt_files() -> dict[str, Any]:
    return {
        "MSRVTT_data.json": JSON,
        "MSRVTT_train.9k.csv": "video_id\nvideo7\nvideo0\n",
        "MSRVTT_train.7k.csv": "video_id\nvideo0\n",
        "MSRVTT_JSFUSION_test.csv": 'key,vid_key,video_id,sentence\nret0,msr7,video7,"a man, in a car"\n',
    }


def test_msrvtt(tmp_path: Path) -> None:
    root = write(tmp_path, msrvtt_files())
    folder = videos(tmp_path, "video0.mp4", "video7.mp4")
    train = load_pairs("msrvtt", "train", root / "MSRVTT_data.json", folder)
    assert [c.name for c in train.clips] == ["video7", "video0"]
    assert train.captions == ("a man drives", "a car is shown", "someone drives a car") and train.owner == (0, 1, 1)
    assert train.of(1) == [1, 2] and train.clips[1].path == folder / "video0.mp4" and train.clips[0].span is None
    seven = load_pairs("msrvtt", "train", root, folder, table=root / "MSRVTT_train.7k.csv")
    assert seven.captions == ("a car is shown", "someone drives a car")
    test = load_pairs("msrvtt", "test", root / "MSRVTT_data.json", folder)
    assert test.captions == ("a man, in a car",) and test.clips[0].name == "video7"


def test_msrvtt_without_sentences_takes_all_captions(tmp_path: Path) -> None:
    files = {**msrvtt_files(), "MSRVTT_JSFUSION_test.csv": "video_id\nvideo0\n"}
    test = load_pairs("msrvtt", "test", write(tmp_path, files), videos(tmp_path, "video0.mp4"))
    assert test.owner == (0, 0)


@pytest.mark.parametrize("end", ["\u2028", "\x85", "\x0c", "\x1e"])
def test_only_ends_of_lines_end_rows(tmp_path: Path, end: str) -> None:
    files = {
        "MSRVTT_JSFUSION_test.csv": f'video_id,sentence\r\nvideo0,a{end}b\r\nvideo1,"a\nb"\r\n',
        "MSRVTT_data.json": JSON,
    }
    assert READERS["msrvtt"]("test", write(tmp_path, files), None).captions == {"video0": ["a b"], "video1": ["a b"]}


def test_msvd(tmp_path: Path) -> None:
    captions = {"-4wsuPCjDBc_5_15": [["a", "squirrel", "eats"], ["a", "chipmunk"]], "other": [["x"]]}
    root = write(tmp_path, {"test_list.txt": "-4wsuPCjDBc_5_15\n\n", "raw-captions.pkl": captions})
    pairs = load_pairs("msvd", "test", root, videos(tmp_path, "-4wsuPCjDBc_5_15.avi"))
    assert pairs.captions == ("a squirrel eats", "a chipmunk") and pairs.owner == (0, 0)
    assert pairs.clips[0].path.name == "-4wsuPCjDBc_5_15.avi"


def test_msvd_bytes_of_old_pickles(tmp_path: Path) -> None:
    # Python 2 wrote str as bytes: {'v': [['a', 'caf\xc3\xa9']]} in protocol 0.
    data = b"(dp0\nS'v'\np1\n(lp2\n(lp3\nS'a'\np4\naS'caf\\xc3\\xa9'\np5\naas."
    root = write(tmp_path, {"train_list.txt": "v\n"})
    (root / "raw-captions.pkl").write_bytes(data)
    assert load_pairs("msvd", "train", root, videos(tmp_path, "v.avi")).captions == ("a café",)


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    root = write(tmp_path, {"train_list.txt": "v\n", "raw-captions.pkl": {"v": Attack(str(mark))}})
    with pytest.raises(ValueError, match=r"expected a pickle of plain containers.*mkdir") as caught:
        load_pairs("msvd", "train", root, videos(tmp_path, "v.avi"))
    assert not mark.exists() and "\n" not in str(caught.value)
    # The control: an ordinary unpickler does run it.
    pickle.loads((root / "raw-captions.pkl").read_bytes())
    assert mark.exists()


def test_didemo(tmp_path: Path) -> None:
    entries = [
        {"video": "1234@N02_5678.mov", "description": "a dog runs", "times": [[0, 0]], "num_segments": 6},
        {"video": "9@N_1.avi", "description": "not this", "times": [[0, 1]]},
        {"video": "1234@N02_5678.mov", "description": "it lies down ", "times": [[2, 3]]},
    ]
    root = write(tmp_path, {"train_list.txt": "1234@N02_5678.avi\n", "train_data.json": entries})
    pairs = load_pairs("didemo", "train", root, videos(tmp_path, "1234@N02_5678.mov.mp4"))
    assert pairs.captions == ("a dog runs it lies down",) and pairs.clips[0].span == (0.0, 31.0)


def test_lsmdc(tmp_path: Path) -> None:
    line = "1004_Juno_00.00.32.967-00.00.35.458\t00:00:32\t00:00:35\t00:00:32\t00:00:35\tSOMEONE walks,\tslowly.\n"
    broken = "0017_Pianist_00.23.28.872-00.23.34.843\ta\tb\tc\td\tSOMEONE plays.\n"
    root = write(tmp_path, {"LSMDC16_annos_training.csv": line + broken, "LSMDC16_challenge_1000_publictect.csv": line})
    folder = videos(tmp_path, "1004_Juno/1004_Juno_00.00.32.967-00.00.35.458.avi")
    for split in ("train", "test"):
        pairs = load_pairs("lsmdc", split, root, folder)
        assert pairs.captions == ("SOMEONE walks, slowly.",)
        assert pairs.clips[0].path.parent.name == "1004_Juno"
    with pytest.raises(FileNotFoundError, match=r"1 of 1 missing.*LSMDC16_annos_val\.csv"):
        load_pairs("lsmdc", "val", root, folder)


def test_activitynet(tmp_path: Path) -> None:
    said = {
        "v_abc-1": {"duration": 82.7, "timestamps": [[0.8, 19.8], [17, 60]], "sentences": ["A man sits.", " He goes."]},
        "v_two": {"duration": 5, "timestamps": [[0, 5]], "sentences": ["Two."]},
    }
    root = write(tmp_path, {"train.json": said, "train_ids.json": ["v_abc-1", "v_two"]})
    write(root, {"val_1.json": said, "val_ids.json": ["v_two"]})
    folder = videos(tmp_path, "abc-1.mkv", "v_two.webm")
    pairs = load_pairs("activitynet", "train", root, folder)
    assert pairs.captions == ("A man sits. He goes.", "Two.") and pairs.clips[0].span == (0.0, 82.7)
    assert load_pairs("activitynet", "test", root, folder).captions == ("Two.",)


def test_missing_videos_are_named_and_counted(tmp_path: Path) -> None:
    root, folder = write(tmp_path, msrvtt_files()), videos(tmp_path, "video7.mp4")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 videos missing in 'videos': video0 \(allow_missing"):
        load_pairs("msrvtt", "train", root, folder)
    with pytest.warns(UserWarning, match="1 of 2 videos missing in 'videos': video0"):
        pairs = load_pairs("msrvtt", "train", root, folder, allow_missing=True)
    assert pairs.missing == ("video0",) and pairs.captions == ("a man drives",)
    (folder / "video7.mp4").unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="captioned videos in the train split"):
        load_pairs("msrvtt", "train", root, folder, allow_missing=True)


def test_missing_annotation_files_are_named_and_counted(tmp_path: Path) -> None:
    folder = videos(tmp_path, "v.avi")
    with pytest.raises(FileNotFoundError, match=r"2 of 2 missing in .*'test_list.txt', 'raw-captions.pkl'"):
        load_pairs("msvd", "test", tmp_path, folder)
    with pytest.raises(FileNotFoundError, match="a folder of videos, got 'nowhere'"):
        load_pairs("msrvtt", "train", write(tmp_path, msrvtt_files()), tmp_path / "nowhere")


def test_videos_without_captions_are_named(tmp_path: Path) -> None:
    root = write(tmp_path, {**msrvtt_files(), "MSRVTT_train.9k.csv": "video_id\nvideo7\nvideo9\n"})
    with pytest.warns(UserWarning, match="1 video left out for want of captions: video9"):
        pairs = load_pairs("msrvtt", "train", root, videos(tmp_path, "video7.mp4", "video9.mp4"))
    assert pairs.blank == ("video9",) and len(pairs.clips) == 1


@pytest.mark.parametrize(
    "name", ["../secret", "a/../../secret", "{root}/secret", "..\\secret", "C:\\secret", "C:secret"]
)
def test_names_may_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    name = name.format(root=tmp_path)
    write(tmp_path, {"secret.mp4": b"x"})
    root = write(tmp_path, {"MSRVTT_JSFUSION_test.csv": f"video_id,sentence\n{name},a\n", "MSRVTT_data.json": JSON})
    with pytest.raises(ValueError, match=r"a video inside 'videos', got .*which leaves it"):
        load_pairs("msrvtt", "test", root, videos(tmp_path, "v.mp4"))
    if "\\" not in name and ":" not in name:
        (tmp_path / "videos" / "a").mkdir()
        pairs = load_pairs("msrvtt", "test", root, tmp_path / "videos", allow_outside=True)
        assert pairs.clips[0].path.resolve() == (tmp_path / "secret.mp4").resolve()


def test_names_may_have_folders_inside(tmp_path: Path) -> None:
    root = write(tmp_path, {"MSRVTT_JSFUSION_test.csv": "video_id,sentence\nsub/v.mp4,a\n"})
    pairs = load_pairs("msrvtt", "test", root, videos(tmp_path, "sub/v.mp4"))
    assert pairs.clips[0].path == tmp_path / "videos/sub/v.mp4"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("MSRVTT_data.json", "{", "none from line 1 on"),
        ("MSRVTT_data.json", "[1]", "entries with 'sentences'"),
        ("MSRVTT_data.json", '{"sentences": 3}', "a list of sentences"),
        ("MSRVTT_data.json", '{"sentences": [{"video_id": "video7"}]}', "entries with 'caption'"),
        ("MSRVTT_data.json", '{"sentences": [{"video_id": "video7", "caption": 4}]}', "text for caption"),
        ("MSRVTT_data.json", "[" * 100_000, "nests too deep"),
        ("MSRVTT_data.json", b"\xff\xfe\x00", "in UTF-8"),
        ("MSRVTT_train.9k.csv", "video\nvideo7\n", "the columns video_id"),
        ("MSRVTT_train.9k.csv", "video_id,x\n ,2\n", "a value for video_id in every row, got none in row 2"),
        ("MSRVTT_train.9k.csv", "", "the columns video_id"),
        ("MSRVTT_train.9k.csv", "video_id\n" + "v" * 200_000 + "\n", "a CSV file"),
    ],
)
def test_malformed_files_cost_one_sentence(tmp_path: Path, name: str, content: Any, says: str) -> None:
    root = write(tmp_path, {**msrvtt_files(), name: content})
    with pytest.raises(ValueError, match=says) as caught:
        load_pairs("msrvtt", "train", root, videos(tmp_path, "video0.mp4", "video7.mp4"))
    assert str(caught.value).startswith("expected ") and "\n" not in str(caught.value)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a datatype among msrvtt, msvd, didemo, lsmdc, activitynet, got 'msr'"):
        load_pairs("msr", "train", tmp_path, tmp_path)
    with pytest.raises(ValueError, match="a split among"):
        load_pairs("msvd", "all", tmp_path, tmp_path)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["v", "v_v"])
KEYS = st.sampled_from(["v", "v_v", "video", "video_id", "caption", "sentences", "description", "duration"])
TREES = st.recursive(
    LEAVES,
    lambda t: st.lists(t, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), t, max_size=4),
    max_leaves=12,
)
FILES = {
    "msrvtt": ("MSRVTT_train.9k.csv", "MSRVTT_data.json"),
    "msvd": ("train_list.txt", "raw-captions.pkl"),
    "didemo": ("train_list.txt", "train_data.json"),
    "lsmdc": ("LSMDC16_annos_training.csv", None),
    "activitynet": ("train_ids.json", "train.json"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("datatype", list(READERS))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    listing=st.binary(max_size=40) | st.text(max_size=40) | st.just("video_id\nv\n"),
    tree=TREES,
    raw=st.binary(max_size=30),
)
def test_any_file_is_read_or_refused_in_one_sentence(
    tmp_path: Path, datatype: str, listing: Any, tree: Any, raw: bytes
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir(exist_ok=True)
    (folder / "v.mp4").touch()
    first, second = FILES[datatype]
    for content in (tree, raw):
        (tmp_path / first).write_bytes(listing if isinstance(listing, bytes) else listing.encode("utf-8", "replace"))
        if second is not None:
            data = content if isinstance(content, bytes) else pickle.dumps(content)
            if not second.endswith(".pkl") and not isinstance(content, bytes):
                data = json.dumps(content).encode()
            (tmp_path / second).write_bytes(data)
        for outside in (False, True):
            try:
                pairs = load_pairs(datatype, "train", tmp_path, folder, allow_missing=True, allow_outside=outside)
            except ValueError as error:
                assert str(error).startswith("expected ") and "\n" not in str(error)
            except FileNotFoundError as error:
                assert str(error).startswith("expected ")
            else:
                assert len(pairs.captions) == len(pairs.owner) > 0 and all(pairs.captions)
