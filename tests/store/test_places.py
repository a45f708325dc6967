"""Places: a folder and object storage do the same."""

import os
import pickle
import stat
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from ctfm.store import places
from ctfm.store.errors import ConfigError, PlaceError, StoreError
from ctfm.store.places import LocalPlace, Place, RemotePlace, place_of


class PlaceTests:
    """What every place promises."""

    @pytest.fixture
    def place(self) -> Place:
        raise NotImplementedError

    def test_gives_back_what_was_published_last(self, place: Place) -> None:
        place.prepare(["", "a"])
        place.publish("a/b.json", b"old")
        place.publish("a/b.json", b"new")
        assert place.has("a/b.json")
        assert place.read("a/b.json") == b"new"

    def test_adds_a_file_once_whoever_comes_first(self, place: Place) -> None:
        place.prepare(["a"])
        with ThreadPoolExecutor(8) as pool:
            added = list(pool.map(lambda i: place.add("a/b", b"%d" % i), range(8)))
        assert sum(added) == 1
        assert place.read("a/b") == b"%d" % added.index(True)

    def test_lists_a_folder_without_what_lies_below(self, place: Place) -> None:
        place.prepare(["", "a", "a/c"])
        for name in ("x", "a/2", "a/1", "a/c/3"):
            place.publish(name, b"1234")
        assert place.names("a") == ["1", "2"]
        assert sorted(place.files()) == [("a/1", 4), ("a/2", 4), ("a/c/3", 4), ("x", 4)]

    def test_reads_many_in_the_order_asked_for(self, place: Place) -> None:
        place.prepare([""])
        for i in range(30):
            place.publish(f"{i}", b"%d" % i)
        assert list(place.read_many([f"{i}" for i in range(29, -1, -1)])) == [
            b"%d" % i for i in range(29, -1, -1)
        ]

    def test_deleting_what_is_not_there_is_no_error(self, place: Place) -> None:
        place.prepare([""])
        place.publish("a", b"x")
        place.delete("a")
        place.delete("a")
        assert not place.has("a")

    def test_reading_what_is_not_there_is_an_error_with_its_name(self, place: Place) -> None:
        place.prepare([""])
        with pytest.raises(StoreError, match=r"nowhere\.json cannot be read") as raised:
            place.read("nowhere.json")
        assert not isinstance(raised.value, PlaceError)

    def test_holds_zarr_arrays(self, place: Place) -> None:
        place.prepare(["", "group"])
        array = zarr.create_array(
            place.arrays("group"), name="cls", shape=(6, 2), chunks=(3, 2), dtype="<f4"
        )
        array[:] = np.ones((6, 2))
        assert np.array_equal(zarr.open_array(place.arrays("group"), path="cls"), np.ones((6, 2)))
        assert place.has("group/cls/c/1/0")

    def test_is_the_same_in_another_process(self, place: Place) -> None:
        place.prepare([""])
        place.publish("a", b"x")
        again: Place = pickle.loads(pickle.dumps(place))  # noqa: S301
        assert again == place
        assert again.read("a") == b"x"

    def test_knows_its_name(self, place: Place) -> None:
        assert place.path.name == "store"
        assert place_of(place.path) == place


class TestLocalPlace(PlaceTests):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return place_of(tmp_path / "deep" / "store")

    def test_a_file_system_without_hard_links_adds_by_renaming(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refused)
        place.prepare([""])
        assert place.add("a", b"first")
        assert not place.add("a", b"second")
        assert place.read("a") == b"first"
        assert place.names("") == ["a"]

    def test_syncs_what_it_adds_before_it_has_its_name_and_the_folder_after(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place.prepare([""])
        events: list[str] = []
        link = os.link

        def recorded(partial: Path, path: Path) -> None:
            events.append("link")
            link(partial, path)

        monkeypatch.setattr(
            os,
            "fsync",
            lambda fd: events.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"),
        )
        monkeypatch.setattr(os, "link", recorded)
        place.add("a", b"x")
        assert events == ["file", "link", "folder"]

    def test_a_folder_that_goes_away_is_not_made_again(self, place: Place) -> None:
        with pytest.raises(StoreError, match="its folder does not exist"):
            place.publish("a/b", b"x")


class TestRemotePlace(PlaceTests):
    @pytest.fixture
    def place(self, bucket: str) -> Place:
        return place_of(f"{bucket}/features/store/")

    def test_another_store_with_a_longer_name_is_not_part_of_it(self, place: Place) -> None:
        other = place_of(f"{place.path}-2")
        other.publish("a", b"x")
        assert list(place.files()) == []
        assert place.names("") == []

    def test_a_bucket_that_is_not_there_is_said_so(self, s3_endpoint: str) -> None:
        nowhere = place_of("s3://no-such-bucket/store")
        with pytest.raises(PlaceError, match="cannot write s3://no-such-bucket/store"):
            nowhere.publish("a", b"x")
        with pytest.raises(PlaceError, match="Check the bucket, the network"):
            list(nowhere.files())

    def test_a_server_that_does_not_answer_is_said_so_in_one_sentence(
        self, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setattr(places, "RETRY_TIMEOUT_S", 0.1)
        for attempt in attempts(place_of(f"{bucket}/store")):
            with pytest.raises(PlaceError, match="then run the same command again") as raised:
                attempt()
            assert "\n" not in str(raised.value)


def attempts(place: Place) -> list[Callable[[], object]]:
    return [
        lambda: place.read("a"),
        lambda: place.has("a"),
        lambda: place.publish("a", b"x"),
        lambda: place.add("a", b"x"),
        lambda: place.names("a"),
    ]


def test_object_storage_without_its_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ConfigError, match=r"pip install 'ctfm\[object-store\]'"):
        place_of("s3://bucket/store")


@pytest.mark.parametrize("url", ["s4://bucket/store", "http://host/store", "s3://", "memory:///x"])
def test_a_url_that_is_no_object_storage_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no place for a store: give a folder, or a URL"):
        place_of(url)


def test_a_path_is_a_folder_whatever_its_name() -> None:
    assert place_of("features/s3") == LocalPlace(Path("features/s3"))
    assert isinstance(place_of("s3://b/x"), RemotePlace)
