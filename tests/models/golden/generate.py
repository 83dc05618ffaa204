#!/usr/bin/env python3
"""Writes the golden models of this folder: small random checkpoints and what transformers computes for them.

    pip install torch transformers==5.17.0 && python3 generate.py OUT
    pip install torch transformers==5.23.0 && python3 generate.py OUT

writes the entries that belong to the installed version of transformers (the gated norm of Mamba-2 with n_groups > 1
changed in 5.23: one mean over the row before, one per group since). Everything is computed in float32 on the CPU with
the plain path (no kernels, no cache).

golden.safetensors: context_ids i32 [T]; context_logits f32 [R, vocab], at the last R positions; tree_parents i32 [N] (-1: child of the
context's last token) and tree_tokens i32 [N]; tree_logits f32 [N, vocab], each path run on its own; greedy_ids i32
[G] and greedy_top2_gap f32 [G].
"""
import json
import os
import random
import sys

import torch
import transformers as T
from safetensors.torch import save_file

torch.set_grad_enabled(False)
VOCAB = 192


def config(name, **keys):
    base = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
                hidden_act="silu")
    cls = getattr(T, name + "Config")(**{**base, **keys})
    return cls, getattr(T, name + "ForCausalLM")


def llama(name="Llama", **keys):
    return config(name, **{**dict(hidden_size=64, num_hidden_layers=2, intermediate_size=88,
                                  num_attention_heads=4, num_key_value_heads=2), **keys})


def mamba2(**keys):
    return config("Mamba2", **{**dict(hidden_size=48, num_hidden_layers=2, state_size=48, head_dim=24, num_heads=4,
                                      expand=2, n_groups=2, conv_kernel=4, chunk_size=16), **keys})


def bamba(**keys):
    return config("Bamba", **{**dict(hidden_size=64, num_hidden_layers=3, attn_layer_indices=[1],
                                     intermediate_size=72, num_attention_heads=4, num_key_value_heads=1,
                                     mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=4, mamba_d_state=32,
                                     mamba_chunk_size=16), **keys})


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}

# name: (transformers version, model, dtype of the saved weights, greedy steps, form of the saved folder)
MODELS = {
    "mamba2-whole-row": ("5.17", lambda: mamba2(), torch.float32, 40, "v4"),
    "bamba-whole-row": ("5.17", lambda: bamba(), torch.float32, 0, ""),
    "llama-llama3": ("5.17", lambda: llama(num_key_value_heads=4, rope_parameters=LLAMA3), torch.float32, 40, ""),
    "mamba2-groups": ("5.23", lambda: mamba2(use_bias=True, time_step_limit=(0.02, 0.6), tie_word_embeddings=True),
                      torch.float32, 0, ""),
    "mamba2-bf16": ("5.23", lambda: mamba2(n_groups=4, num_heads=8, head_dim=12, conv_kernel=3, use_conv_bias=False),
                    torch.bfloat16, 0, ""),
    "bamba-groups": ("5.23", lambda: bamba(attention_bias=True, mlp_bias=True, mamba_proj_bias=True,
                                           mamba_conv_bias=False, mamba_n_groups=2, num_key_value_heads=2,
                                           attn_layer_indices=[0, 2], tie_word_embeddings=True), torch.bfloat16, 0, ""),
    "llama-biases-linear": ("5.23", lambda: llama(attention_bias=True, mlp_bias=True, rope_parameters=LINEAR,
                                                  head_dim=24), torch.float32, 0, "v4 sharded"),
    "llama-f16": ("5.23", lambda: llama(tie_word_embeddings=True, num_key_value_heads=1), torch.float16, 0, ""),
    "qwen2-tied": ("5.23", lambda: llama("Qwen2", tie_word_embeddings=True), torch.bfloat16, 0, ""),
    "qwen3-head-32": ("5.23", lambda: llama("Qwen3", head_dim=32, attention_bias=True, rope_parameters=LLAMA3),
                      torch.bfloat16, 0, ""),
}


def randomise(model):
    """Weights that make every part matter: large enough that a wrong order, group or sign shows in the logits."""
    for name, p in model.named_parameters():
        noise = torch.randn_like(p)
        if p.dim() == 2:
            p.copy_(noise * (1.2 / p.shape[1] ** 0.5 if "embed" not in name else 1.0))
        elif p.dim() == 3:
            p.copy_(noise * 0.5)
        elif name.endswith("A_log"):
            p.copy_(torch.rand_like(p) * 1.5 - 0.5)
        elif "dt_bias" in name:
            p.copy_(noise * 0.7 - 1.0)
        elif name.endswith("weight"):
            p.add_(noise * 0.2)
        else:
            p.add_(noise * 0.3)


def logits(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def tree(rng, nodes, max_depth):
    parents, tokens, depths = [-1], [rng.randrange(3, VOCAB)], [0]
    while len(parents) < nodes:
        parent = len(parents) - 1 if rng.random() < 0.6 else rng.randrange(-1, len(parents))
        depth = depths[parent] + 1 if parent >= 0 else 0
        token = rng.randrange(3, VOCAB)
        siblings = [t for p, t in zip(parents, tokens) if p == parent]
        if depth > max_depth or token in siblings:
            continue
        parents.append(parent), tokens.append(token), depths.append(depth)
    return parents, tokens


def golden(model, rng, greedy):
    context = [1] + [rng.randrange(3, VOCAB) for _ in range(76)]  # past two folding boundaries of 32
    parents, tokens = tree(rng, 24, 12)
    rows = []
    for node in range(len(parents)):
        path, at = [], node
        while at >= 0:
            path.append(tokens[at])
            at = parents[at]
        rows.append(logits(model, context + path[::-1])[-1])
    i32 = lambda values: torch.tensor(values, dtype=torch.int32)
    result = {"context_ids": i32(context), "context_logits": logits(model, context)[-12:].contiguous(),
              "tree_parents": i32(parents), "tree_tokens": i32(tokens), "tree_logits": torch.stack(rows)}
    if greedy:
        ids, gaps = list(context), []
        for _ in range(greedy):
            last = logits(model, ids)[-1]
            top = last.topk(2).values
            gaps.append((top[0] - top[1]).item())
            ids.append(int(last.argmax()))
        result["greedy_ids"] = i32(ids[len(context):])
        result["greedy_top2_gap"] = torch.tensor(gaps)
    return result


def as_version_4(folder):
    """Rewrites config.json into the form of transformers 4: rope_theta and rope_scaling, bare Infinity."""
    path = folder + "/config.json"
    keys = json.load(open(path))
    rope = keys.pop("rope_parameters", None)
    if rope:
        keys["rope_theta"] = rope.pop("rope_theta")
        keys["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    if "time_step_limit" in keys:
        keys["time_step_limit"] = [0.0, float("inf")]
    keys["torch_dtype"] = keys.pop("dtype", "float32")
    keys["transformers_version"] = "4.46.0"
    json.dump(keys, open(path, "w"), indent=2, sort_keys=True)


def main(out):
    for number, (name, (version, make, dtype, greedy, form)) in enumerate(MODELS.items()):
        if not T.__version__.startswith(version + "."):
            continue
        torch.manual_seed(7000 + number)
        cfg, cls = make()
        model = cls(cfg).eval()
        randomise(model)
        folder = os.path.join(out, name)
        os.makedirs(folder, exist_ok=True)
        size = "60KB" if "sharded" in form else "5GB"
        model.to(dtype).save_pretrained(folder, max_shard_size=size)
        # Read back rather than widened in place, which would leave RoPE's frequencies rounded too.
        model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        if os.path.exists(folder + "/generation_config.json"):
            os.remove(folder + "/generation_config.json")
        if "v4" in form:
            as_version_4(folder)
        result = golden(model, random.Random(7000 + number), greedy)
        save_file(result, folder + "/golden.safetensors", metadata={"transformers": T.__version__, "torch": torch.__version__})
        std = result["tree_logits"].std().item()
        print(name, sum(p.numel() for p in model.parameters()), "parameters, logits' deviation", round(std, 3), flush=True)


main(sys.argv[1])
