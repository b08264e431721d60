import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grood_edge import decoding, images, threads
from grood_edge.decoding import decoded
from grood_edge.errors import DatasetError, UsageError
from grood_edge.images import UnreadableImageError, load_image
from grood_edge.threads import decoding_threads, limited_threads, thread_limit


def of(item: int) -> np.ndarray:
    return np.full(10, item)


def decoders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decoding-")]


def test_results_come_in_order_although_later_items_are_done_first() -> None:
    third_is_done = threading.Event()

    def load(item: int) -> np.ndarray:
        if item == 0:
            assert third_is_done.wait(30)
        if item == 2:
            third_is_done.set()
        return of(item)

    found = list(decoded(range(100), load, 3))
    assert [item for item, _ in found] == list(range(100))
    assert all(isinstance(result, np.ndarray) and result[0] == item for item, result in found)
    assert decoders() == []


def test_what_cannot_be_read_is_a_result_and_the_others_go_on() -> None:
    def load(item: int) -> np.ndarray:
        if item % 3 == 0:
            raise UnreadableImageError(f"{item} is damaged")
        return of(item)

    found = dict(decoded(range(10), load, 4))
    assert [item for item, result in found.items() if isinstance(result, UnreadableImageError)] == [0, 3, 6, 9]
    assert str(found[6]) == "6 is damaged"


def test_what_waits_does_not_hold_the_pixels_of_images_that_broke_off(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (400, 400, 3), np.uint8)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    [(_, error)] = decoded([tmp_path / "a.jpg"], load_image)
    assert isinstance(error, UnreadableImageError)
    assert "truncated" in str(error)
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


def test_another_error_is_raised_in_its_items_turn() -> None:
    def load(item: int) -> np.ndarray:
        if item == 5:
            raise DatasetError("five")
        return of(item)

    seen: list[int] = []
    with pytest.raises(DatasetError, match="five"):
        list(_noted(decoded(range(50), load, 4), seen))
    assert seen == [0, 1, 2, 3, 4]
    assert decoders() == []


def _noted(results: Iterator[tuple[int, object]], seen: list[int]) -> Iterator[tuple[int, object]]:
    for item, result in results:
        seen.append(item)
        yield item, result


def test_an_archive_that_breaks_off_gives_what_came_before() -> None:
    def items() -> Iterator[int]:
        yield from range(7)
        raise DatasetError("truncated")

    seen: list[int] = []
    with pytest.raises(DatasetError, match="truncated"):
        list(_noted(decoded(items(), of, 3), seen))
    assert seen == list(range(7))


@pytest.mark.parametrize(("most", "most_bytes", "expected"), [(8, 1 << 30, 8), (1000, 5 * 80, 5)])
def test_few_results_wait(most: int, most_bytes: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "AHEAD", most)
    monkeypatch.setattr(decoding, "AHEAD_BYTES", most_bytes)  # a result has 80 bytes
    started: list[int] = []

    def load(item: int) -> np.ndarray:
        started.append(item)
        return of(item)

    workers = 2
    for item, _ in decoded(range(200), load, workers):
        threading.Event().wait(0.001)  # time to run ahead
        assert len(started) - item <= expected + workers + 1


def test_nobody_decodes_once_the_results_are_dropped() -> None:
    results = decoded(iter(int, 1), of, 4)  # zeros without end
    next(results)
    assert len(decoders()) == 4
    del results
    assert decoders() == []


def test_ctrl_c_in_whoever_takes_them_ends_the_threads() -> None:
    def interrupted() -> None:
        for item, _ in decoded(range(1000), of, 3):
            if item == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert decoders() == []


def test_warnings_are_as_before_after_many_threads_decoded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / f"{index:02d}.jpg")
    before = list(warnings.filters)
    assert len(list(decoded(sorted(tmp_path.iterdir()), load_image, 8))) == 40
    assert list(warnings.filters) == before


def test_the_limit_is_of_the_block_and_of_the_innermost_one() -> None:
    assert thread_limit() is None
    with limited_threads(3):
        assert (thread_limit(), decoding_threads()) == (3, 3)
        with limited_threads(1), limited_threads(None):
            assert (thread_limit(), decoding_threads()) == (1, 1)
        assert thread_limit() == 3
    assert thread_limit() is None


def test_decoders_are_as_many_as_cores_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 5)
    assert decoding_threads() == 5
    with limited_threads(1000):
        assert decoding_threads() == threads.MOST_DECODERS


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_a_number_of_threads_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match="--threads"), limited_threads(count):
        pytest.fail("the block must not run")


def test_a_file_that_never_comes_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PATIENCE", 0.1)
    opened, let_go = threading.Event(), threading.Event()

    def load(item: int) -> np.ndarray:
        if item == 1:
            opened.set()
            assert let_go.wait(30)
        return of(item)

    results = decoded(range(3), load, 2)
    assert next(results)[0] == 0
    assert opened.wait(30)
    results.close()
    assert len(decoders()) == 1
    let_go.set()


def test_an_item_that_does_not_come_holds_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PATIENCE", 0.1)
    comes = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        assert comes.wait(30)
        yield 1

    loaded: list[int] = []

    def load(item: int) -> np.ndarray:
        loaded.append(item)
        return of(item)

    results = decoded(items(), load, 2)
    found = [next(results)[0]]
    results.close()
    assert (found, comes.is_set()) == ([0], False)
    left = decoders()
    comes.set()
    assert len(left) == 2
    for thread in threading.enumerate():
        if thread.name in left:
            thread.join(30)
    assert loaded == [0]  # what comes after the end is not decoded


def test_large_images_are_decoded_and_resized_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "LARGE_PIXELS", 100)
    Image.new("RGB", (20, 20)).save(tmp_path / "large.png")
    Image.new("RGB", (5, 5)).save(tmp_path / "small.png")
    held: set[int] = set()
    most = {"large.png": 0, "small.png": 0}
    both_small = threading.Barrier(2)

    def load(item: tuple[int, str]) -> np.ndarray:
        place, name = item
        frame = load_image(tmp_path / name)
        if name == "small.png":
            both_small.wait(30)  # two are in here at once, or this raises
            return frame
        held.add(place)
        most[name] = max(most[name], len(held))
        time.sleep(0.02)  # others would come now
        held.remove(place)
        return frame

    assert len(list(decoded([(i, "large.png") for i in range(6)], load, 3))) == 6
    assert len(list(decoded([(i, "small.png") for i in range(6)], load, 2))) == 6
    assert most["large.png"] == 1
