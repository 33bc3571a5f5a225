"""`dsllm data prepare` against its tokenizer's library in memory, and against `datasets.map` with a file at the end.

All read the same text, Python's own and its packages' source files as JSON lines, with the same vocabularies and
processes. The contenders take turns, several rounds of them, and a ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from measure import describe_machine, write_results
from rich.console import Console
from rich.table import Table

DSLLM = "dsllm data prepare"
LIBRARY = "tokenizer alone, in memory"
DATASETS = "datasets.map, then one file"
# What is compared with what, and the least ratio that is good enough.
RATIOS = ((DSLLM, LIBRARY, 0.85), (DSLLM, DATASETS, 1.0))
MOST_RESIDENT_BYTES = 10**9
SENTENCEPIECE_TOKENS = 8192
_FILE_BYTES = 32 * 2**20
_BATCH_DOCUMENTS = 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpt2", default="gpt2", help="GPT-2's tokenizer: a folder, or its name on the Hub")
    parser.add_argument("--megabytes", type=int, default=240, help="text to read")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each contender gets")
    parser.add_argument("--contender", choices=("library", "datasets"), help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args.contender, args.corpus, args.tokenizer)
        return 0
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text_bytes = write_corpus(folder / "corpus", args.megabytes * 10**6)
        vocabularies = make_vocabularies(folder, args.gpt2)
        rows = [measure(folder, vocabulary, text_bytes, args.rounds, console) for vocabulary in vocabularies.items()]
    show(console, rows)
    path = write_results(
        "data-throughput-cpu.json",
        {"machine": describe_machine(), "text_bytes": text_bytes, "processes": _num_cores(), "rows": rows},
    )
    console.print(f"Written to {path}")
    return 0


def write_corpus(folder: Path, most_bytes: int) -> int:
    """JSON lines of source files, in files of 32 MiB; the bytes of text in them. Says so where there is too little."""
    folder.mkdir()
    documents = _source_files()
    text_bytes = 0
    for number in range(10**6):
        with (folder / f"{number:03d}.jsonl").open("w", encoding="utf-8") as file:
            while file.tell() < _FILE_BYTES:
                text = next(documents, None)
                if text is None or text_bytes >= most_bytes:
                    return text_bytes
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                text_bytes += len(text.encode())
    raise AssertionError("more files than text")


def _source_files() -> Iterator[str]:
    """Python's own source files and those of installed packages, once each."""
    for root in dict.fromkeys([Path(os.__file__).parent, Path(psutil.__file__).parents[1]]):
        for file in sorted(root.rglob("*.py")):
            try:
                text = file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip():
                yield text


def make_vocabularies(folder: Path, gpt2: str) -> dict[str, Path]:
    """GPT-2's tokenizer and a sentencepiece one trained on the corpus, each in a folder."""
    from transformers import AutoTokenizer

    from dsllm.data.tokenizer import build_tokenizer
    from dsllm.spec.load import load_spec

    AutoTokenizer.from_pretrained(gpt2).save_pretrained(folder / "gpt2")
    tokenizer = f"{{kind: sentencepiece, vocab_size: {SENTENCEPIECE_TOKENS}, training_bytes: 8000000}}"
    sources = f"data.sources=[{{kind: jsonl, path: '{folder / 'corpus'}'}}]"
    spec = load_spec("quickstart", [sources, f"tokenizer={tokenizer}"])
    build_tokenizer(spec, folder / "sentencepiece")
    return {"GPT-2": folder / "gpt2", f"sentencepiece {SENTENCEPIECE_TOKENS}": folder / "sentencepiece"}


def measure(
    folder: Path, vocabulary: tuple[str, Path], text_bytes: int, rounds: int, console: Console
) -> dict[str, Any]:
    """Bytes of text a second of every contender, by round, and the largest resident memory of ours."""
    name, tokenizer = vocabulary
    speeds: dict[str, list[float]] = {DSLLM: [], LIBRARY: [], DATASETS: []}
    resident_bytes = 0
    for number in range(rounds):
        seconds, peak_bytes = time_command(_dsllm_command(folder, tokenizer))
        resident_bytes = max(resident_bytes, peak_bytes)
        speeds[DSLLM].append(text_bytes / seconds)
        for contender, contender_name in (("library", LIBRARY), ("datasets", DATASETS)):
            speeds[contender_name].append(text_bytes / own_seconds(contender, folder, tokenizer))
        numbers = ", ".join(f"{contender}: {each[-1] / 1e6:.1f} MB/s" for contender, each in speeds.items())
        console.print(f"{name}, round {number + 1} of {rounds}: {numbers}")
    ratios = {
        f"{one} / {other}": statistics.median(a / b for a, b in zip(speeds[one], speeds[other], strict=True))
        for one, other, _ in RATIOS
    }
    return {"vocabulary": name, "bytes_per_second": speeds, "ratios": ratios, "resident_bytes": resident_bytes}


def _dsllm_command(folder: Path, tokenizer: Path) -> list[str]:
    """The whole command, its start included, on a data folder that is not there yet."""
    shutil.rmtree(folder / "data", ignore_errors=True)
    settings = [
        f"data.sources=[{{kind: jsonl, path: '{folder / 'corpus'}'}}]",
        f"tokenizer={{kind: pretrained, name: '{tokenizer}'}}",
        "model.vocab_size=50257",
        f"data.directory={folder / 'data'}",
    ]
    overrides = [part for setting in settings for part in ("--set", setting)]
    return [str(Path(sys.executable).with_name("dsllm")), "data", "prepare", "quickstart", *overrides]


def time_command(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, and the largest sum of resident bytes of its processes, asked for ten times a second."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks = [0]
    watcher = threading.Thread(target=_watch, args=(process, peaks))
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - began
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}: {errors.decode()}")
    return seconds, max(peaks)


def _watch(process: subprocess.Popen[bytes], peaks: list[int]) -> None:
    while process.poll() is None:
        resident = 0
        try:
            parent = psutil.Process(process.pid)
            for each in (parent, *parent.children(recursive=True)):
                resident += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        peaks.append(resident)
        time.sleep(0.1)


def own_seconds(contender: str, folder: Path, tokenizer: Path) -> float:
    """What the contender says that it took, in a process of its own."""
    command = [sys.executable, __file__, "--contender", contender]
    command += ["--corpus", str(folder / "corpus"), "--tokenizer", str(tokenizer)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def contend(contender: str, corpus: Path, tokenizer: Path) -> None:
    """Print the seconds of one contender."""
    print(_library_seconds(corpus, tokenizer) if contender == "library" else _datasets_seconds(corpus, tokenizer))


def _library_seconds(corpus: Path, folder: Path) -> float:
    """The faster of the libraries that know the vocabulary, texts in memory, on all cores; ids are thrown away."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    texts = [json.loads(line)["text"] for file in sorted(corpus.iterdir()) for line in file.open(encoding="utf-8")]
    batches = [texts[first : first + _BATCH_DOCUMENTS] for first in range(0, len(texts), _BATCH_DOCUMENTS)]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoders = [tokenizer.encode_batch_fast]
    if (model := folder / "sentencepiece.model").is_file():
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(model))
        encoders.append(lambda batch: processor.encode(batch, num_threads=_num_cores()))
    seconds = []
    for encode in encoders:
        began = time.perf_counter()
        for batch in batches:
            encode(batch)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _datasets_seconds(corpus: Path, folder: Path) -> float:
    """The usual way: map over the dataset in as many processes, then every id into one file of 16 bits."""
    from datasets import Dataset, disable_caching, load_dataset
    from transformers import PreTrainedTokenizerFast

    disable_caching()
    import numpy as np

    with tempfile.TemporaryDirectory() as cache:
        files = [str(file) for file in sorted(corpus.iterdir())]
        dataset = load_dataset("json", data_files=files, split="train", cache_dir=cache)
        assert isinstance(dataset, Dataset)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        end = [tokenizer.eos_token_id]

        def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            encoded = tokenizer(rows["text"], return_attention_mask=False, verbose=False)["input_ids"]
            return {"ids": [ids + end for ids in encoded]}

        began = time.perf_counter()
        mapped = dataset.map(encode, batched=True, remove_columns=["text"], num_proc=_num_cores())
        with (Path(cache) / "train.bin").open("wb") as file:
            for batch in mapped.with_format("numpy").iter(batch_size=_BATCH_DOCUMENTS):
                file.write(np.concatenate(batch["ids"]).astype(np.uint16).tobytes())
        return time.perf_counter() - began


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """The medians, the ratios, and whether they are good enough."""
    table = Table(title="Text to tokens")
    for column in ("vocabulary", "contender", "MB/s", "ratio to it", "wanted", "resident MB"):
        table.add_column(column, justify="left" if column in ("vocabulary", "contender") else "right")
    wanted = {f"{one} / {other}": least for one, other, least in RATIOS}
    for row in rows:
        for contender, speeds in row["bytes_per_second"].items():
            ratio = f"{DSLLM} / {contender}"
            cells = (
                (f"{row['ratios'][ratio]:.2f}", f"{wanted[ratio]:.2f}", "")
                if ratio in wanted
                else ("", "", f"{row['resident_bytes'] / 1e6:,.0f}")
            )
            table.add_row(row["vocabulary"], contender, f"{statistics.median(speeds) / 1e6:.1f}", *cells)
    console.print(table)
    over = [row["vocabulary"] for row in rows if row["resident_bytes"] > MOST_RESIDENT_BYTES]
    slow = [name for row in rows for name, least in wanted.items() if row["ratios"][name] < least]
    console.print(f"missed: {', '.join(slow + over)}" if slow or over else "every bound is kept")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main())
