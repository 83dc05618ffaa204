#!/usr/bin/env python3
"""Writes a golden file: what transformers computes for a checkpoint in float32, on the CPU.

    python3 tests/models/golden/make_golden.py MODEL_DIR OUT.safetensors [--prompt TEXT]
    build/release/canopy golden --model MODEL_DIR --golden OUT.safetensors

Needs torch, transformers 5 and safetensors. The file holds
    context_ids      i32 [T]
    context_logits   f32 [8, vocab]   of the last 8 context positions
    tree_parents     i32 [N]          -1: a child of the context's last token
    tree_tokens      i32 [N]
    tree_logits      f32 [N, vocab]   after the context and the path to the node, each path on its own
    greedy_ids       i32 [G]          greedy continuation of the context
    greedy_top2_gap  f32 [G]          gap of the two largest logits at each step
and, as metadata, the prompt. A model without a tokenizer gets random context tokens.
"""

import argparse
import os
import random

import torch
import transformers
from safetensors.torch import save_file


def random_tree(rng, nodes, vocab, height):
    """Parents and tokens; siblings carry different tokens."""
    parents, tokens, depths = [], [], []
    while len(parents) < nodes:
        # Late parents are preferred, so that the tree gets deep as well as wide.
        parent = max(rng.randrange(-1, len(parents)) for _ in range(2)) if parents else -1
        depth = 0 if parent < 0 else depths[parent] + 1
        token = rng.randrange(vocab)
        siblings = [tokens[i] for i in range(len(parents)) if parents[i] == parent]
        if depth < height and token not in siblings:
            parents.append(parent)
            tokens.append(token)
            depths.append(depth)
    return parents, tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--prompt", default="A box has 60 crayons. How many are left when 15 are lost?")
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--height", type=int, default=8)
    parser.add_argument("--greedy", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    vocab = model.config.vocab_size
    rng = random.Random(args.seed)
    if os.path.exists(os.path.join(args.model, "tokenizer.json")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        context = tokenizer(args.prompt)["input_ids"]
    else:
        context = [rng.randrange(vocab) for _ in range(40)]

    def logits(ids):
        # Without a cache: every call runs the whole sequence, which is what the file stands for.
        return model(torch.tensor([ids]), use_cache=False).logits[0].float()

    parents, tokens = random_tree(rng, args.nodes, vocab, args.height)
    tree_logits = []
    for node in range(args.nodes):
        path, at = [], node
        while at >= 0:
            path.insert(0, tokens[at])
            at = parents[at]
        tree_logits.append(logits(context + path)[-1])

    greedy, gaps = [], []
    for _ in range(args.greedy):
        step = logits(context + greedy)[-1]
        best = step.topk(2).values
        gaps.append((best[0] - best[1]).item())
        greedy.append(int(step.argmax()))

    def i32(values):
        return torch.tensor(values, dtype=torch.int32)

    save_file(
        {
            "context_ids": i32(context),
            "context_logits": logits(context)[-8:].contiguous(),
            "tree_parents": i32(parents),
            "tree_tokens": i32(tokens),
            "tree_logits": torch.stack(tree_logits),
            "greedy_ids": i32(greedy),
            "greedy_top2_gap": torch.tensor(gaps),
        },
        args.out,
        metadata={"prompt": args.prompt, "transformers": transformers.__version__},
    )


if __name__ == "__main__":
    main()
