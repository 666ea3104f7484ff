"""What fewer bits cost: perplexity and greedy agreement of a model's quantized forms, side by side.

    python bench/quality.py MODEL --text HELDOUT --calibrate OTHER [--backend torch] [--chars 300000]

MODEL is a folder or a bundled model's name. HELDOUT is a UTF-8 text that the model was not trained on, texts in it
parted by two empty lines; OTHER is a text of the same kind, not the same text, for the calibrated forms (int4).
Perplexity is read as `maestrale eval --documents` reads it. Agreement: of 20 pieces of 64 tokens cut evenly from
HELDOUT, the share of positions where the likeliest next token is the one of the model as it is stored (teacher-forced).
The native backend's rounded activations count in, and each form is measured with an int8 cache too.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import tempfile
import time
from pathlib import Path

from maestrale import LLM
from maestrale.checkpoint.quantize import Recipe, quantize
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.checkpoint.rounding import round_to_nearest
from maestrale.cli.evaluate import cut, score
from maestrale.launch import model_folder
from maestrale.plan import count_parameters
from maestrale.text.tokenizer import load_tokenizer
from maestrale.torch_backend.gptq import Calibrated
from maestrale.values import MAX_SIZE

RECIPES = {
    "int8": Recipe("int8"),
    "int4, groups of 32": Recipe("int4", 32),
    "int4, groups of 32, head int8": Recipe("int4", 32, "int8"),
    "int4, groups of 128": Recipe("int4", 128),
}
PIECES, PIECE = 20, 64


def measure(folder: Path, texts: list[str], pieces: list[list[int]], options: dict) -> tuple[float, list[list[int]]]:
    """(perplexity, the likeliest next token at each position of each piece)."""
    llm = LLM(folder, **options)
    ids = [llm.tokenizer.encode(text) for text in texts]
    logprobs = score(llm, [segment for text in ids for segment in cut(text, llm.max_len, llm.max_len // 2)])
    choices = [logits.argmax(axis=1).tolist() for logits in llm.logits(pieces)]
    del llm
    gc.collect()
    return math.exp(-math.fsum(logprobs) / len(logprobs)), choices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument(
        "--backend", default="torch", help="torch (float32, so that weights alone are judged) or native"
    )
    parser.add_argument("--chars", type=int, default=300_000, help="read of HELDOUT")
    arguments = parser.parse_args()
    model = model_folder(arguments.model)
    options = {"backend": arguments.backend, "dtype": "float32" if arguments.backend == "torch" else "auto"}
    texts = [text for text in arguments.text.read_text()[: arguments.chars].split("\n\n\n") if text.strip()]

    with open_checkpoint(model) as source:
        config = source.config
        options["max_len"] = MAX_SIZE if all(config.sliding_window) else None  # as `maestrale eval` has it
        tokenizer = load_tokenizer(model, config.vocab_size)
        ids = [token for text in texts for token in tokenizer.encode(text, bos=False)]
        step = len(ids) // PIECES
        pieces = [[tokenizer.bos_id, *ids[i * step : i * step + PIECE - 1]] for i in range(PIECES)]
        base, wanted = measure(model, texts, pieces, options)
        bits = source.stored_bits().total() / count_parameters(config)[0]
        rows: list[dict] = [{"form": f"as stored ({source.dtype})", "bits": bits, "perplexity": base}]
        print(f"{arguments.model}, {arguments.backend}: {len(ids):,} tokens\n", flush=True)
        print(f"{'form':46} {'bits':>6} {'perplexity':>11} {'change':>8} {'agreement':>10}")
        print(f"{rows[0]['form']:46} {bits:6.2f} {base:11.4f}", flush=True)

        def add(form: str, folder: Path, cache: str, seconds: float) -> None:
            perplexity, choices = measure(folder, texts, pieces, options | {"cache": cache})
            with open_checkpoint(folder) as written:
                bits = written.stored_bits().total() / count_parameters(written.config)[0]
            same = sum(a == b for one, two in zip(wanted, choices, strict=True) for a, b in zip(one, two, strict=True))
            row = {
                "form": form + (", cache int8" if cache == "int8" else ""),
                "bits": round(bits, 3),
                "perplexity": perplexity,
                "change": perplexity / base - 1,
                "agreement": same / (PIECES * PIECE),
                "seconds": seconds,
            }
            rows.append(row)
            print(
                f"{row['form']:46} {bits:6.2f} {perplexity:11.4f} {row['change']:+8.2%} {row['agreement']:10.1%}",
                flush=True,
            )

        caches = ("auto", "int8") if arguments.backend == "native" else ("auto",)
        for cache in caches[1:]:
            add("as stored", model, cache, 0)
        calibration = []
        if arguments.calibrate:
            calibration = tokenizer.encode(arguments.calibrate.read_text()[:1_000_000], bos=False)
        for form, recipe in RECIPES.items():
            for calibrated in (False, True) if calibration and recipe.weights == "int4" else (False,):
                with tempfile.TemporaryDirectory() as scratch:
                    start, packed = time.perf_counter(), Path(scratch) / "packed"
                    quantizer = Calibrated(source, calibration, tokenizer.bos_id) if calibrated else round_to_nearest
                    quantize(model, packed, recipe, quantizer)
                    seconds = time.perf_counter() - start
                    for cache in caches:
                        add(form + (", calibrated" if calibrated else ""), packed, cache, seconds)
    print(json.dumps({"model": arguments.model, "backend": arguments.backend, "tokens": len(ids), "rows": rows}))


if __name__ == "__main__":
    main()
