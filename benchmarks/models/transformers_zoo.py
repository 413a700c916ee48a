# SPDX-License-Identifier: Apache-2.0
"""Prunes Hugging Face's models, small ones with random weights, without help for any of them, and proves each.

    python -m benchmarks.models.transformers_zoo [--only GLOB] [--ratio 0.3] [--report FOLDER]

Development only: `pip install transformers` first. Nothing is downloaded: every model is made from a small config.
"""

import argparse
import copy
import datetime
import fnmatch
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize

import fxslim
from benchmarks.models.zoo import free_share, randomise
from benchmarks.timing import machine
from fxslim import Inputs
from fxslim.graph.inputs import output_tensors
from fxslim.graph.slots import owner
from fxslim.pruning.verification import VISIBLE

Example = Callable[[int], Inputs]
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99, "pad_token_id": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
SWIN = {
    "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2
}  # fmt: skip
SEGFORMER = {
    "hidden_sizes": [16, 32], "depths": [1, 2], "num_attention_heads": [2, 4], "num_encoder_blocks": 2,
    "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 24,
}  # fmt: skip
WHISPER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
    "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 20, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
SPEECH = {
    **TEXT, "conv_dim": [16, 24], "conv_stride": [4, 2], "conv_kernel": [8, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0,
    "apply_spec_augment": False,
    "layerdrop": 0.0, "classifier_proj_size": 24,
}  # fmt: skip
CLIP_TEXT = {**TEXT, "max_position_embeddings": 20}


def tokens(size: int, high: int = 90) -> torch.Tensor:
    return torch.randint(3, high, (2, size))


def words(size: int) -> Inputs:
    return Inputs(input_ids=tokens(size))


def masked_words(size: int) -> Inputs:
    mask = torch.ones(2, size, dtype=torch.long)
    mask[1, size // 2 :] = 0
    return Inputs(input_ids=tokens(size), attention_mask=mask)


def labelled_words(size: int) -> Inputs:
    ids = tokens(size)
    return Inputs(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)


def one_label(size: int) -> Inputs:
    return Inputs(input_ids=tokens(size), labels=torch.tensor([0, 2]))


def uncached_words(size: int) -> Inputs:
    return Inputs(input_ids=tokens(size), use_cache=False)


def cached_words(size: int) -> Inputs:
    return Inputs(input_ids=tokens(size), use_cache=True)


def two_texts(size: int) -> Inputs:
    return Inputs(input_ids=tokens(size), decoder_input_ids=tokens(size - 2), use_cache=False)


def two_texts_labelled(size: int) -> Inputs:
    return Inputs(input_ids=tokens(size), labels=tokens(size - 2), use_cache=False)


def pixels(size: int) -> Inputs:
    return Inputs(pixel_values=torch.randn(2, 3, 32, 32))


def any_pixels(size: int) -> Inputs:
    return Inputs(pixel_values=torch.randn(1, 3, 8 * (size // 2), 64))


def labelled_pixels(size: int) -> Inputs:
    return Inputs(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1]))


def pixels_and_words(size: int) -> Inputs:
    return Inputs(input_ids=tokens(size), pixel_values=torch.randn(2, 3, 32, 32))


def spectrum(size: int) -> Inputs:
    ids = tokens(size)
    return Inputs(input_features=torch.randn(2, 8, 32), decoder_input_ids=ids, use_cache=False)


def sound(size: int) -> Inputs:
    return Inputs(input_values=torch.randn(2, 40 * size))


def made(kind: str, settings: Mapping[str, object], **more: object) -> Callable[[], nn.Module]:
    """A model class by its name, from a config of these settings."""

    def build() -> nn.Module:
        cls = getattr(transformers, kind)
        return cls(cls.config_class(**{**settings, **more}))

    return build


def clip(**more: object) -> nn.Module:
    settings = {"text_config": CLIP_TEXT, "vision_config": IMAGE, "projection_dim": 24}
    return transformers.CLIPModel(transformers.CLIPConfig(**{**settings, **more}))


def without_weight_norm() -> nn.Module:
    model: Any = made("Wav2Vec2ForCTC", SPEECH)()
    parametrize.remove_parametrizations(model.wav2vec2.encoder.pos_conv_embed.conv, "weight")
    return model


LLAMA = {**TEXT, "num_key_value_heads": 2}
MODELS: dict[str, tuple[Callable[[], nn.Module], Example]] = {
    "BERT": (made("BertModel", TEXT), words),
    "BERT, masked": (made("BertModel", TEXT), masked_words),
    "BERT, classes": (made("BertForSequenceClassification", TEXT, num_labels=3), one_label),
    "BERT, words (tied)": (made("BertForMaskedLM", TEXT), words),
    "BERT, tokens": (made("BertForTokenClassification", TEXT), words),
    "BERT, spans": (made("BertForQuestionAnswering", TEXT), words),
    "DistilBERT": (made("DistilBertModel", DISTIL), words),
    "DistilBERT, classes": (made("DistilBertForSequenceClassification", DISTIL), masked_words),
    "RoBERTa, classes": (made("RobertaForSequenceClassification", TEXT, num_labels=3), one_label),
    "ViT": (made("ViTModel", IMAGE), pixels),
    "ViT, classes": (made("ViTForImageClassification", IMAGE), labelled_pixels),
    "GPT-2": (made("GPT2Model", GPT2), uncached_words),
    "GPT-2, words": (made("GPT2LMHeadModel", GPT2), labelled_words),
    "GPT-2, classes": (made("GPT2ForSequenceClassification", GPT2, pad_token_id=0), uncached_words),
    "GPT-2, cache": (made("GPT2LMHeadModel", GPT2), cached_words),
    "Llama": (made("LlamaModel", LLAMA), uncached_words),
    "Llama, words": (made("LlamaForCausalLM", LLAMA), labelled_words),
    "Llama, classes": (made("LlamaForSequenceClassification", LLAMA), uncached_words),
    "Llama, one head": (made("LlamaForCausalLM", TEXT, num_key_value_heads=1), labelled_words),
    "Llama, tied": (made("LlamaForCausalLM", LLAMA, tie_word_embeddings=True), labelled_words),
    "Llama, cache": (made("LlamaForCausalLM", LLAMA), cached_words),
    "Qwen2, words": (made("Qwen2ForCausalLM", LLAMA), labelled_words),
    "Qwen3, words": (made("Qwen3ForCausalLM", LLAMA, head_dim=8), labelled_words),
    "T5": (made("T5Model", T5), two_texts),
    "T5, words": (made("T5ForConditionalGeneration", T5, decoder_start_token_id=0), two_texts_labelled),
    "T5, gated": (made("T5ForConditionalGeneration", T5, feed_forward_proj="gated-gelu"), two_texts),
    "Swin": (made("SwinModel", SWIN), pixels),
    "Swin, classes": (made("SwinForImageClassification", SWIN), labelled_pixels),
    "CLIP, vision": (made("CLIPVisionModel", IMAGE), pixels),
    "CLIP, text": (made("CLIPTextModel", CLIP_TEXT), words),
    "CLIP": (clip, pixels_and_words),
    "Whisper": (made("WhisperModel", WHISPER), spectrum),
    "Whisper, words": (made("WhisperForConditionalGeneration", WHISPER), spectrum),
    "SegFormer": (made("SegformerModel", SEGFORMER), any_pixels),
    "SegFormer, classes": (made("SegformerForImageClassification", SEGFORMER), any_pixels),
    "SegFormer, segments": (made("SegformerForSemanticSegmentation", SEGFORMER), any_pixels),
    "wav2vec2": (made("Wav2Vec2Model", SPEECH), sound),
    "wav2vec2, words": (made("Wav2Vec2ForCTC", SPEECH), sound),
    "wav2vec2, words, without weight norm": (without_weight_norm, sound),
    "wav2vec2, layer norm": (
        made("Wav2Vec2ForCTC", SPEECH, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True), sound,
    ),
}  # fmt: skip


def row(name: str, importance: str, ratio: float) -> tuple[bool, str]:
    """One line of the report, and whether the model passed."""
    build, example = MODELS[name]
    torch.manual_seed(0)
    model = random_model(build)
    # Modules may get a configuration of their own; the one that the user gave stays.
    config, before = model.config, copy.deepcopy(model.config.to_dict())
    inputs = [example(12), example(8)]
    start = time.process_time()
    plan = fxslim.plan_pruning(model, inputs[0], ratio=ratio, importance=importance)
    seconds = time.process_time() - start
    proof = plan.verify(model, inputs)
    graph = fxslim.trace(model, inputs[0])
    frozen = graph.frozen_layers()
    weights = (".weight", ".parametrizations.weight.original1")
    layers = [owner(n) for n, p in model.named_parameters() if p.dim() > 1 and n.endswith(weights)]
    cut = {owner(c.name) for c in plan.cuts}
    free = free_share(graph, layers)
    kind = type(model)
    plan.apply(model)
    after = config.to_dict()
    train(model, inputs[0])
    problems = [] if proof.ok else ["DIFFERS" if proof.effect >= VISIBLE else "VACUOUS"]
    problems += ["CONFIG"] if after != before or type(model) is not kind else []
    problems += [] if loads_again(model, build, plan, inputs[1]) else ["SAVING"]
    problems += [] if free >= 0.95 else ["FROZEN"]
    reasons = Counter(reason.rpartition(" in ")[0] or reason for reason in frozen.values())
    cells = [
        name, ", ".join(problems) or "OK", f"{plan.macs[1] / plan.macs[0]:.3f}",
        f"{plan.params[1] / plan.params[0]:.3f}", f"{sum(n in cut for n in layers)}/{len(layers)}", f"{free:.0%}",
        f"{proof.relative:.0e}", f"{proof.effect:.0e}", f"{seconds:.2f}",
        "; ".join(f"{count} {reason}" for reason, count in reasons.most_common()),
    ]  # fmt: skip
    return not problems, "| " + " | ".join(cells) + " |"


def random_model(build: Callable[[], nn.Module]) -> Any:
    """Random in all that a state has; buffers that are no part of it are computed by the model itself."""
    model = build()
    computed = {n: b.clone() for n, b in model.named_buffers() if n not in model.state_dict()}
    randomise(model)
    for name, value in computed.items():
        model.get_buffer(name).data = value
    return model.eval()


def train(model: nn.Module, inputs: Inputs) -> None:
    """A backward in train mode, dropout active."""
    outputs = output_tensors(inputs.copied().run(model.train()))
    torch.stack([out.sum() for out in outputs if out.requires_grad]).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    model.eval()


def loads_again(model: nn.Module, build: Callable[[], nn.Module], plan: fxslim.PruningPlan, inputs: Inputs) -> bool:
    """Whether a fresh model with the plan and the saved weights computes the same."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        fxslim.save(model, Path(folder) / "model.safetensors")
        again = fxslim.load(build(), Path(folder) / "model.safetensors").eval()
        before, after = (output_tensors(inputs.copied().run(m)) for m in (model, again))
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*")
    parser.add_argument("--importance", default="random")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = []
    for name in MODELS:
        if not fnmatch.fnmatch(name, options.only):
            continue
        try:
            results.append(row(name, options.importance, options.ratio))
        except Exception as error:
            first = str(error).splitlines()[0][:200] if str(error) else ""
            results.append((False, f"| {name} | FAILED | | | | | | | | {type(error).__name__}: {first} |"))
        print(results[-1][1], flush=True)
    passed = sum(ok for ok, _ in results)
    head = [
        f"# Hugging Face's models, {datetime.date.today()}", "",
        machine(), f"transformers {transformers.__version__}", "",
        f"{passed} of {len(results)} small models with random weights pruned by {options.ratio:.0%} of their macs",
        f"({options.importance} choice), equal to the silenced original in float64 on two inputs (another length or",
        "resolution where the model allows it), trained afterwards with dropout, saved and loaded again. `relative`",
        "is the largest difference over the largest output, `effect` that of the removal itself, `free` the share of",
        "layers with removable channels among those that do not make the output (below 95 %: FROZEN), seconds are CPU",
        "time of planning. Reproduce: `pip install transformers`, then",
        f"`python -m benchmarks.models.transformers_zoo --importance {options.importance} --ratio {options.ratio}`.",
        "",
        "| model | | macs kept | params kept | layers cut | free | relative | effect | s | layers that stay because |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    if options.only == "*":
        path = options.report / f"{datetime.date.today()}-zoo-transformers.md"
        path.write_text("\n".join([*head, *(text for _, text in results), ""]))
    print(f"{passed} of {len(results)} passed")


if __name__ == "__main__":
    main()
