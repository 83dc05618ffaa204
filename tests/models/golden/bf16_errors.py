#!/usr/bin/env python3
"""How far transformers itself is from a golden file when it computes in bfloat16, on the CPU.

    python3 tests/models/golden/bf16_errors.py MODEL_DIR=GOLDEN.safetensors ... > bf16_errors.tsv

A line for each model: its folder's name, and the largest difference of a logit after the context or
at a tree node. scripts/gpu-tests.sh allows half as much again in bf16. Needs torch, transformers 5 and
safetensors.
"""

import os
import sys

import torch
import transformers
from safetensors.torch import load_file


def largest_error(model_dir, golden_file):
    golden = load_file(golden_file)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    context = golden["context_ids"].long()
    parents, tokens = golden["tree_parents"].tolist(), golden["tree_tokens"].tolist()

    def logits(ids):
        return model(ids[None], use_cache=False).logits[0].float()

    with torch.no_grad():
        expected = golden["context_logits"]
        worst = (logits(context)[-expected.shape[0]:] - expected).abs().max().item()
        for node in range(len(parents)):
            path, at = [], node
            while at >= 0:
                path.insert(0, tokens[at])
                at = parents[at]
            last = logits(torch.cat([context, torch.tensor(path)]))[-1]
            worst = max(worst, (last - golden["tree_logits"][node]).abs().max().item())
    return worst


def main():
    transformers.logging.set_verbosity_error()
    print(f"# transformers {transformers.__version__}, torch {torch.__version__}")
    for pair in sys.argv[1:]:
        model_dir, golden_file = pair.split("=")
        name = os.path.basename(os.path.normpath(model_dir))
        print(f"{name}\t{largest_error(model_dir, golden_file):.4f}", flush=True)


if __name__ == "__main__":
    main()
