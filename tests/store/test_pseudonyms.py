"""Pseudonyms: stable under a key, apart by kind, and the originals without a key."""

import hashlib
import hmac
import re

from ctfm.store.pseudonyms import Pseudonyms, new_key

KEY = bytes(range(32))


def test_an_id_is_the_start_of_the_hmac_of_kind_and_original() -> None:
    digest = hmac.new(KEY, b"patient\x0012-345", hashlib.sha256).hexdigest()
    assert Pseudonyms(KEY).patient("12-345") == "p" + digest[:16]


def test_the_same_original_has_different_ids_as_patient_study_and_scan() -> None:
    pseudonyms = Pseudonyms(KEY)
    ids = [make("1.2.3") for make in (pseudonyms.patient, pseudonyms.study, pseudonyms.scan)]
    assert [made[0] for made in ids] == ["p", "s", "c"]
    assert len({made[1:] for made in ids}) == 3
    assert all(re.fullmatch(r"[psc][0-9a-f]{16}", made) for made in ids)


def test_ids_agree_under_one_key_and_differ_under_another() -> None:
    assert Pseudonyms(KEY).scan("1.2.3") == Pseudonyms(KEY).scan("1.2.3")
    assert Pseudonyms(KEY).scan("1.2.3") != Pseudonyms(new_key()).scan("1.2.3")


def test_white_space_around_an_original_does_not_count() -> None:
    assert Pseudonyms(KEY).patient(" 007 ") == Pseudonyms(KEY).patient("007")
    assert Pseudonyms(KEY).patient("007") != Pseudonyms(KEY).patient("7")


def test_without_a_key_ids_are_the_originals() -> None:
    assert Pseudonyms(None).study(" 1.2.840.1 ") == "1.2.840.1"


def test_keys_are_32_bytes_and_never_the_same() -> None:
    assert len(new_key()) == 32
    assert new_key() != new_key()
