"""Large files: texts stream to a memory-mapped file, and memory stays well below their size."""

import gc
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bayesrm.data import Comparisons, Demonstrations


def write_pairs(path, num_rows, num_words):
    """Writes pairs, two a prompt with one response in common; returns the bytes of all texts."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"word{number}" for number in range(1000)])
    filler = [" ".join(vocabulary[rng.integers(1000, size=num_words)]) for _ in range(500)]
    schema = pa.schema({name: pa.string() for name in ("prompt", "chosen", "rejected")})
    size = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, num_rows, 50_000):
            rows = range(start, min(start + 50_000, num_rows))
            columns = {
                "prompt": [f"Question {row // 2}: {filler[row // 2 % 499]}" for row in rows],
                "chosen": [f"Answer {row // 2}: {filler[row // 2 % 491]}" for row in rows],
                "rejected": [f"Guess {row}: {filler[row % 487]}" for row in rows],
            }
            size += sum(len(text) for texts in columns.values() for text in texts)
            writer.write_table(pa.table(columns, schema=schema))
    return size


def test_streaming_gives_the_same_as_memory(tmp_path):
    path = tmp_path / "pairs.parquet"
    write_pairs(path, 20_000, 10)
    small = Comparisons.load(path)
    cache = tmp_path / "cache"
    large = Comparisons.load(path, in_memory_limit=50_000, cache_dir=cache)
    written = sorted(file.name for file in cache.rglob("*.arrow"))
    assert written == ["items.arrow", "prompts.arrow"]
    assert (large.num_prompts, large.num_items) == (10_000, 30_000)
    assert large.items.data.table.equals(small.items.data.table)
    assert large.prompts.data.table.equals(small.prompts.data.table)
    for ours, theirs in zip(large.groups(), small.groups(), strict=True):
        assert ours.items.equal(theirs.items)
    part = large.select([19_999])
    assert part.text(0)[1].startswith("Answer 9999:")
    del large, ours, theirs
    gc.collect()
    assert part.text(1)[1].startswith("Guess 19999:"), "a part keeps the file that it needs"
    del part
    gc.collect()
    assert not list(cache.rglob("*.arrow")), "the file goes with the last data that use it"


def test_texts_of_a_small_file_stay_in_memory(tmp_path):
    path = tmp_path / "pairs.parquet"
    write_pairs(path, 100, 10)
    Comparisons.load(path, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_siblings_stream_too(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"completion {i}"} for i in range(5000)]
    data = Demonstrations.load(rows, in_memory_limit=1000, cache_dir=tmp_path)
    assert data.text(4321) == ("p4321", "completion 4321")
    assert list(tmp_path.rglob("*.arrow"))


MEASURE = """
import json, sys, threading, time
import pyarrow, pyarrow.parquet, numpy, torch
from bayesrm.data import Comparisons

def resident():
    # Anonymous memory: pages of mapped files can be dropped at any time and do not count.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

before = peak = resident()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.02)

watcher = threading.Thread(target=watch)
watcher.start()
started, began = time.perf_counter(), time.process_time()
data = Comparisons.load(sys.argv[1])
seconds, cpu = time.perf_counter() - started, time.process_time() - began
groups = data.groups()
done = True
watcher.join()
print(json.dumps({"rows": len(data),
                  "items": data.num_items, "prompts": data.num_prompts, "seconds": seconds, "cpu": cpu,
                  "growth": peak - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory figures from /proc")
def test_a_million_rows_stay_well_below_the_size_of_their_texts(tmp_path):
    path = tmp_path / "pairs.parquet"
    size = write_pairs(path, 1_000_000, 70)
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert (found["rows"], found["items"], found["prompts"]) == (1_000_000, 1_500_000, 500_000)
    assert found["growth"] < 0.4 * size, f"{found['growth'] / 2**20:.0f} MiB for texts of {size / 2**20:.0f} MiB"
    # Processor time, which other load on the machine does not inflate; about twice what it needs.
    assert found["cpu"] < 100
