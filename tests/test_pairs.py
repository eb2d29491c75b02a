import io
import itertools
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcmem_cli.engine.data.manifest import Record, load_manifest
from lcmem_cli.engine.data.pairs import (
    all_pairs,
    identity_numbers,
    identity_pairs,
    reference_pairs,
    same_image_pairs,
    single_identity_datasets,
)
from lcmem_cli.engine.errors import InputError


def make(*rows):
    """Records from ``(data set, id)``; the path is the position."""
    return [Record(f"{i}.png", str(name), "TEST", ds) for i, (ds, name) in enumerate(rows)]


def listed(pairs):
    return list(
        zip(pairs.first.tolist(), pairs.second.tolist(), pairs.labels.tolist(), strict=True)
    )


def by_pandas(frame, seed):
    """The definition of method.md section 5, in the words of pandas."""
    rng = random.Random(seed)
    rows = []
    if "ds_name" not in frame:
        frame = frame.assign(ds_name="test")
    for ds in frame.ds_name.unique():
        groups = [list(part.index) for _, part in frame[frame.ds_name == ds].groupby("id")]
        for own, images in enumerate(groups):
            for i, image in enumerate(images):
                if len(images) < 2:
                    continue
                rows.append((image, images[(i + 1) % len(images)], 1))
                other = rng.randint(0, len(groups) - 1)
                while other == own:
                    other = rng.randint(0, len(groups) - 1)
                rows.append((image, groups[other][0], 0))
    return rows


def test_the_first_pairs_worked_out_by_hand():
    records = make(("d", "b"), ("d", "a"), ("d", "b"), ("d", "c"), ("d", "a"), ("d", "a"))
    rng = random.Random(42)
    draws = [rng.randint(0, 2) for _ in range(40)]

    def negative(own):
        while (drawn := draws.pop(0)) == own:
            pass
        return [1, 0, 3][drawn]  # first images of a, b, c

    expected = []
    for own, images in ((0, [1, 4, 5]), (1, [0, 2])):
        for i, image in enumerate(images):
            expected.append((image, images[(i + 1) % len(images)], 1))
            expected.append((image, negative(own), 0))
    pairs = reference_pairs(records)
    assert listed(pairs) == expected
    assert pairs.num_duplicates >= 1  # b has two images, so its positive occurs twice
    assert (pairs.num_positives, pairs.num_negatives) == (5, 5)


ids = st.sampled_from(["1", "2", "10", "11", "a", "B", "b", "1.5", "-3", "2e1"])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["x", "y"]), ids), min_size=1, max_size=25),
    st.integers(0, 3),
)
def test_reference_pairs_equal_the_definition_in_pandas(rows, seed):
    records = make(*rows)
    text = "path,id,ds_name\n" + "\n".join(f"{r.path},{r.id},{r.ds_name}" for r in records)
    frame = pd.read_csv(io.StringIO(text))
    if single_identity_datasets(records):
        with pytest.raises(InputError, match="single identity"):
            reference_pairs(records, seed)
    else:
        assert listed(reference_pairs(records, seed)) == by_pandas(frame, seed)


def test_numeric_ids_sort_as_numbers_only_if_the_whole_column_is_numeric():
    records = make(*(("d", name) for name in ("10", "9", "10", "9")))
    assert reference_pairs(records).first[0] == 1
    assert reference_pairs(records, column=[r.id for r in records] + ["x"]).first[0] == 0


def test_without_data_sets_everything_is_one_set():
    records = [r._replace(ds_name=None) for r in make(*((None, n) for n in "aabb"))]
    assert reference_pairs(records).names == ("test",)


def test_data_sets_come_in_order_of_appearance_and_share_the_randomness():
    rows = [("z", "a"), ("z", "a"), ("z", "b"), ("z", "c"), ("a", "p"), ("a", "p"), ("a", "q")]
    pairs = reference_pairs(make(*rows, ("a", "r")), seed=7)
    assert pairs.names == ("z", "a")
    alone = reference_pairs(make(*rows[4:], ("a", "r")), seed=7)
    together = [reference_pairs(make(*rows, ("a", "r")), seed=s) for s in range(20)]
    separate = [reference_pairs(make(*rows[4:], ("a", "r")), seed=s) for s in range(20)]
    shifted = [
        (p.second[p.dataset == 1] - 4).tolist() == s.second.tolist()
        for p, s in zip(together, separate, strict=True)
    ]
    assert len(alone) == 4 and not all(shifted)


def test_single_images_are_drawn_but_never_anchors():
    records = make(*[("d", "a")] * 2, *[("d", f"s{i}") for i in range(30)])
    drawn = set()
    for seed in range(40):
        pairs = reference_pairs(records, seed)
        assert set(pairs.first.tolist()) == {0, 1}
        drawn |= set(pairs.second[pairs.labels == 0].tolist())
    assert len(drawn) > 15


def test_a_set_with_one_identity_is_refused_by_name():
    records = make(("good", "a"), ("good", "b"), ("good", "a"), ("bad one", "c"), ("bad one", "c"))
    for build in (reference_pairs, identity_pairs, same_image_pairs):
        with pytest.raises(InputError, match="'bad one'"):
            build(records)
    assert single_identity_datasets(records) == ["bad one"]
    assert len(identity_pairs(records, negatives=False)) == 2


def test_more_negatives_keep_each_anchors_positive():
    records = make(*(("d", name) for name in "aabbcc"))
    pairs = reference_pairs(records, negatives_per_anchor=5)
    assert (pairs.num_positives, pairs.num_negatives) == (6, 30)
    assert pairs.num_distinct(0) <= 12 < 30


records_of_two_sets = st.lists(
    st.tuples(st.sampled_from("xy"), st.sampled_from("abcd")), min_size=2, max_size=20
).map(lambda rows: make(*rows))


@settings(max_examples=60, deadline=None)
@given(records_of_two_sets)
def test_all_pairs_are_all_pairs_within_data_sets(records):
    pairs = all_pairs(records)
    expected = {
        (i, j, int(records[i].id == records[j].id))
        for i, j in itertools.combinations(range(len(records)), 2)
        if records[i].ds_name == records[j].ds_name
    }
    assert set(listed(pairs)) == expected and len(pairs) == len(expected)
    assert pairs.num_duplicates == 0
    for row, dataset in zip(pairs.first, pairs.dataset, strict=True):
        assert records[row].ds_name == pairs.names[dataset]


def test_too_many_pairs_are_refused_before_memory_is_taken():
    with pytest.raises(InputError, match="10 pairs, more than the limit of 9"):
        all_pairs(make(*[("d", "a")] * 5), max_pairs=9)
    people = make(*[("d", "a")] * 4, *[("d", "b")] * 3, *[("e", "b")] * 2, ("e", "c"))
    with pytest.raises(InputError, match="make 20 pairs, more than the limit of 19"):
        identity_pairs(people, max_pairs=19)
    assert len(identity_pairs(people, max_pairs=20)) == 20
    assert len(identity_pairs(people, negatives=False, max_pairs=10)) == 10


@settings(max_examples=60, deadline=None)
@given(records_of_two_sets, st.integers(0, 5))
def test_robustness_pairs(records, seed):
    if single_identity_datasets(records):
        return
    within = identity_pairs(records, seed)
    positives = [row for row in listed(within) if row[2]]
    expected = [
        (i, j)
        for i, j in itertools.combinations(range(len(records)), 2)
        if records[i].identity == records[j].identity
    ]
    assert sorted((a, b) for a, b, _ in positives) == expected
    same = same_image_pairs(records, seed)
    assert sorted(a for a, b, label in listed(same) if label) == list(range(len(records)))
    assert all(a == b for a, b, label in listed(same) if label)
    for pairs in (within, same):
        assert pairs.num_positives == pairs.num_negatives
        for (a, _, _), (c, d, label) in zip(listed(pairs)[::2], listed(pairs)[1::2], strict=True):
            assert label == 0 and a == c
            assert records[c].ds_name == records[d].ds_name
            assert records[c].id != records[d].id


def test_negatives_are_drawn_evenly_from_all_images_of_others():
    records = make(*(("d", name) for name in "aaabbc"))
    drawn = np.zeros(6, dtype=int)
    for seed in range(300):
        pairs = same_image_pairs(records, seed)
        drawn += np.bincount(pairs.second[(pairs.labels == 0) & (pairs.first == 0)], minlength=6)
    assert drawn[:3].sum() == 0 and drawn[3:].min() > 70


def test_identities_are_keyed_by_data_set_and_id():
    numbers, strata = identity_numbers(make(("x", "a"), ("y", "a"), ("x", "a"), ("x", "b")))
    assert numbers.tolist() == [0, 1, 0, 2] and strata.tolist() == [0, 1, 0]


def test_the_real_filelist(shared_data):
    frame = pd.read_csv(shared_data / "filelist.csv")
    frame = frame[frame.Split == "TEST"].reset_index(drop=True)
    records = load_manifest(shared_data / "filelist.csv").select("TEST").records
    pairs = reference_pairs(records)
    assert listed(pairs) == by_pandas(frame, 42)
    assert len(pairs) == 2210 and pairs.num_duplicates == 87
