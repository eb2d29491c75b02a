import hashlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lcmem_cli.engine.store.features import FeatureCache

PRINT, OTHER = "a" * 64, "a" * 32 + "b" * 32  # equal in the part that names the folder


def keys(*names):
    return [hashlib.sha256(str(name).encode()).hexdigest() for name in names]


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_rows_come_back_in_order_with_a_mask(tmp_path, dtype):
    rows = np.random.default_rng(0).integers(0, 255, (5, 7)).astype(dtype)
    FeatureCache(tmp_path, PRINT).put_many(keys(0, 1, 2), rows[:3])
    FeatureCache(tmp_path, PRINT).put_many(keys(3, 4), rows[3:])
    cache = FeatureCache(tmp_path, PRINT)
    found, mask = cache.get_many(keys(4, "unknown", 1, 1))
    np.testing.assert_array_equal(found, rows[[4, 1, 1]])
    assert found.dtype == dtype and mask.tolist() == [True, False, True, True]
    assert len(cache) == 5 and keys(2)[0] in cache and "unknown" not in cache


def test_nothing_known_and_nothing_to_keep(tmp_path):
    cache = FeatureCache(tmp_path / "missing", PRINT)
    cache.put_many([], np.zeros((0, 3), np.float32))
    assert not cache.get_many(keys(1))[1].any() and not (tmp_path / "missing").exists()


def test_another_detectors_features_are_never_returned(tmp_path):
    FeatureCache(tmp_path, PRINT).put_many(keys(1), np.ones((1, 3), np.float32))
    assert len(FeatureCache(tmp_path, OTHER)) == 0


@pytest.mark.parametrize("from_end", [1, 4 * 6 + 1])
def test_a_damaged_row_is_unknown_and_the_others_are_not(tmp_path, from_end):
    FeatureCache(tmp_path, PRINT).put_many(keys(0, 1), np.ones((2, 6), np.float32))
    (file,) = (tmp_path / PRINT[:32]).iterdir()
    data = bytearray(file.read_bytes())
    where = data.rindex(np.float32(1).tobytes()) + 4
    data[where - from_end] ^= 4
    file.write_bytes(data)
    cache = FeatureCache(tmp_path, PRINT)
    rows, mask = cache.get_many(keys(0, 1))
    assert mask.sum() == 1 and (rows == 1).all()
    lost = keys(int(mask[0]))
    cache.put_many(lost, np.full((1, 6), 2, np.float32))
    for again in (cache, FeatureCache(tmp_path, PRINT)):
        np.testing.assert_array_equal(again.get_many(lost)[0], np.full((1, 6), 2))


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"not a cache file"])
def test_a_foreign_or_cut_file_is_passed_over(tmp_path, content):
    FeatureCache(tmp_path, PRINT).put_many(keys(0), np.ones((1, 6), np.float32))
    (tmp_path / PRINT[:32] / f"{'0' * 32}.safetensors").write_bytes(content)
    assert len(FeatureCache(tmp_path, PRINT)) == 1


WRITER = """
import sys, hashlib, numpy as np
from pathlib import Path
from lcmem_cli.engine.store.features import FeatureCache
cache = FeatureCache(Path(sys.argv[1]), "a" * 64)
for n in range(100000):
    key = hashlib.sha256(f"{sys.argv[2]}{n}".encode()).hexdigest()
    cache.put_many([key], np.full((1, 64), n % 250, np.float32))
    print(n, flush=True)
"""


def test_two_writers_killed_at_any_moment_leave_every_finished_row(tmp_path):
    writers = {
        name: subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name], stdout=subprocess.PIPE, text=True
        )
        for name in ("x", "y")
    }
    for writer in writers.values():
        assert writer.stdout is not None
        writer.stdout.readline()
    time.sleep(0.2)
    cache_lengths = [len(FeatureCache(tmp_path, PRINT)) for _ in range(2)]  # while they write
    for name, writer in writers.items():
        os.kill(writer.pid, signal.SIGKILL)
        lines = [0, *map(int, writer.communicate()[0].split())]
        cache = FeatureCache(tmp_path, PRINT)
        wanted = keys(*(f"{name}{n}" for n in range(max(lines) + 1)))
        rows, mask = cache.get_many(wanted)
        assert mask.all()
        np.testing.assert_array_equal(rows[:, 0], np.arange(len(wanted)) % 250)
    assert 0 < cache_lengths[0] <= cache_lengths[1] <= len(FeatureCache(tmp_path, PRINT))
