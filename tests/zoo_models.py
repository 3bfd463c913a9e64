"""Small configurations of the architectures that people have: the real code, random weights, float64.

Each builder gives a model and a batch from the present random state.  A batch is a dictionary of keyword arguments of a
model whose output has a ``loss``, or whatever the entry's own loss function takes.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Size:
    """How many times as large as usual a model is built: its widths, lengths (sides of images), and batches."""

    width: int = 1
    length: int = 1
    batch: int = 1


BATCH, LENGTH, VOCABULARY = 2, 7, 19

_sizes = [Size()]
"""The size that is built is the last one."""


def wide(width: int) -> int:
    """A width at the size that is built."""
    return width * _sizes[-1].width


def long(length: int) -> int:
    """A length of sequences, or a side of images, at the size that is built."""
    return length * _sizes[-1].length


def many(samples: int = BATCH) -> int:
    """A number of samples at the size that is built."""
    return samples * _sizes[-1].batch


def sized(**settings: Any) -> dict[str, Any]:
    """Settings of a library's configuration, at the size that is built."""
    grown = dict.fromkeys(_WIDTHS, wide) | dict.fromkeys(_LENGTHS, long)
    return {
        key: value if key not in grown else grown[key](value) if isinstance(value, int) else [*map(grown[key], value)]
        for key, value in settings.items()
    }


_WIDTHS = (
    "vocab_size", "hidden_size", "intermediate_size", "embedding_size", "head_dim", "ffn_dim", "word_embed_proj_dim",
    "n_embd", "dim", "hidden_dim", "d_model", "d_kv", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "projection_dim",
    "attention_hidden_size", "time_step_rank", "embed_dim", "hidden_sizes", "groups_width", "decoder_hidden_size",
    "num_mel_bins", "conv_dim", "block_out_channels", "attention_head_dim", "cross_attention_dim",
)  # fmt: skip
_LENGTHS = (
    "max_position_embeddings", "n_positions", "sliding_window", "local_attention", "context_length", "chunk_size",
    "prediction_length", "image_size", "sample_size", "max_source_positions", "max_target_positions",
)  # fmt: skip


def own_loss(model: Any, batch: Any) -> Tensor:
    """The loss that the model computes itself."""
    return model(**batch).loss


class Doubled(TorchFunctionMode):
    """A block in which what a model casts to float32 is float64, so that differences are not those of rounding."""

    def __enter__(self) -> Doubled:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        torch.set_default_dtype(self.before)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


def doubled(loss_fn: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """The same loss without single precision anywhere."""

    @functools.wraps(loss_fn)
    def loss(model: Any, batch: Any) -> Tensor:
        with Doubled():
            return loss_fn(model, batch)

    return loss


@dataclass(frozen=True)
class Entry:
    """An architecture of the zoo.

    Attributes:
        build: gives a model and a batch; takes the variant's options.
        loss_fn: of a model and a batch.
        options: what can be varied: names of options and their values, the first of which is the usual one.
        kinked: whether its slopes jump, so that finite differences would step over kinks, or something in it moves but
            counts as constant; derivatives by nested differentiation stand for them.
        needs: packages that it is made with.
        tolerance: relative, of H̄ and of the third order's diagonal.
        size: at which it is priced: widths, lengths and batches as people have them, of a few layers.
    """

    build: Callable[..., tuple[nn.Module, Any]]
    loss_fn: Callable[[Any, Any], Tensor] = own_loss
    options: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    kinked: bool = False
    needs: tuple[str, ...] = ()
    tolerance: tuple[float, float] = (1e-6, 1e-5)
    size: Size = Size(48, 9, 1)

    @property
    def is_here(self) -> bool:
        """Whether the packages that it needs are installed."""
        return all(importlib.util.find_spec(name) is not None for name in self.needs)


ZOO: dict[str, Entry] = {}


def entry(name: str, *needs: str, **fields: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Puts a builder into the zoo."""

    def put(build: Callable[..., Any]) -> Callable[..., Any]:
        ZOO[name] = Entry(build, needs=needs, **fields)
        return build

    return put


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tokens() -> Tensor:
    """Token numbers above the special ones."""
    return torch.randint(3, wide(VOCABULARY), (many(), long(LENGTH)))


def padding() -> Tensor:
    """An attention mask: the last sequence ends two tokens earlier."""
    mask = torch.ones(many(), long(LENGTH), dtype=torch.int64)
    mask[-1, -2:] = 0
    return mask


# transformers: text ---------------------------------------------------------------------------------------------------

TEXT = {"attn_implementation": ("sdpa", "eager"), "mask": (True, False), "train": (True, False)}
"""What is varied in models of text."""

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}


def _text(head: str, config: str, settings: dict[str, Any], mask: bool, **options: Any) -> tuple[nn.Module, Any]:
    """A model of text and a batch with labels that fit its head."""
    import transformers

    model = getattr(transformers, head)(getattr(transformers, config)(**sized(**settings), **options))
    ids = tokens()
    batch = {"input_ids": ids, "labels": ids}
    if "SequenceClassification" in head:
        batch["labels"] = torch.randint(2, (many(),))
    if mask:
        batch["attention_mask"] = padding()
    return model, batch


def _add_text() -> None:
    decoders: dict[str, tuple[str, str, dict[str, Any]]] = {
        "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4,
                  "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}),
        "Llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
        "Qwen 2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
        "Qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 4}),
        "Mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "head_dim": 4, "sliding_window": 4}),
        "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 4, "sliding_window": 4}),
        "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 4, "sliding_window": 4}),
        "Phi 3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
        "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SMALL),
        "OPT": ("OPTForCausalLM", "OPTConfig", {**_SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}),
        "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
        "OLMoE": ("OlmoeForCausalLM", "OlmoeConfig", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
        "BERT": ("BertForMaskedLM", "BertConfig", _SMALL),
        "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", _SMALL),
        "ALBERT": ("AlbertForMaskedLM", "AlbertConfig", {**_SMALL, "embedding_size": 8}),
        "ELECTRA": ("ElectraForMaskedLM", "ElectraConfig", {**_SMALL, "embedding_size": 8}),
        "DistilBERT": ("DistilBertForSequenceClassification", "DistilBertConfig",
                       {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4,
                        "max_position_embeddings": 32, "pad_token_id": 0}),
        "DeBERTa v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config",
                       {**_SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
        "ModernBERT": ("ModernBertForMaskedLM", "ModernBertConfig",
                       {**_SMALL, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}),
        "T5": ("T5ForConditionalGeneration", "T5Config", {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4,
               "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}),
        "BART": ("BartForConditionalGeneration", "BartConfig", {"vocab_size": VOCABULARY, "d_model": 16,
                 "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                 "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32, "pad_token_id": 0,
                 "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}),
    }  # fmt: skip
    for name, (head, config, settings) in decoders.items():
        options = dict(TEXT)
        if name in ("Mixtral", "OLMoE"):
            options["experts_implementation"] = ("eager", "batched_mm")  # the third one multiplies in float32 at most
        if name in ("DeBERTa v2", "T5", "Gemma 2"):  # which have only one
            del options["attn_implementation"]
        kinked = name in ("OPT", "T5", "Mixtral", "OLMoE")  # ReLU, or experts that are chosen
        ZOO[name] = Entry(
            functools.partial(_text, head, config, settings), options=options, kinked=kinked, needs=("transformers",)
        )


_add_text()

SWITCHED = {"train": (True, False)}
ATTENDING = {"attn_implementation": ("sdpa", "eager"), **SWITCHED}


@entry("Mamba", "transformers", options=SWITCHED, size=Size(48, 4, 2))
def _mamba(**_: Any) -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(**sized(vocab_size=VOCABULARY, hidden_size=12, state_size=4, num_hidden_layers=2, expand=2,
                         time_step_rank=3, conv_kernel=3, pad_token_id=0, bos_token_id=1, eos_token_id=2))  # fmt: skip
    ids = tokens()
    return MambaForCausalLM(config), {"input_ids": ids, "labels": ids}


@entry(
    "Mamba 2", "transformers", options=SWITCHED, tolerance=(1e-5, 1e-4), size=Size(48, 4, 2)
)  # differences miss 64 × less with half the step
def _mamba2(**_: Any) -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(**sized(vocab_size=VOCABULARY, hidden_size=12, state_size=4, num_hidden_layers=2, expand=2,
                          num_heads=6, head_dim=4, n_groups=1, chunk_size=4, conv_kernel=3, pad_token_id=0,
                          bos_token_id=1, eos_token_id=2))  # fmt: skip
    ids = tokens()
    return Mamba2ForCausalLM(config), {"input_ids": ids, "labels": ids}


@entry("PatchTST", "transformers", options=SWITCHED, size=Size(32, 8, 16))
def _patchtst(**_: Any) -> Any:
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(**sized(num_input_channels=2, context_length=12, prediction_length=4, patch_length=4,
                            patch_stride=4, d_model=8, num_attention_heads=2, num_hidden_layers=1, ffn_dim=12,
                            loss="mse"))  # fmt: skip
    return PatchTSTForPrediction(config), {
        "past_values": normal(many(), long(12), 2),
        "future_values": normal(many(), long(4), 2),
    }


@entry(
    "RWKV", "transformers", options={"train": (True,)}, kinked=True, size=Size(32, 2, 4)
)  # it rewrites its weights to evaluate
def _rwkv(**_: Any) -> Any:
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(**sized(vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=2, attention_hidden_size=12,
                        intermediate_size=24, context_length=32, pad_token_id=0, bos_token_id=1,
                        eos_token_id=2))  # fmt: skip
    ids = tokens()
    return RwkvForCausalLM(config), {"input_ids": ids, "labels": ids}


# transformers: images and sound ---------------------------------------------------------------------------------------


def _images(size: int = 16, labels: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": normal(many(), 3, long(size), long(size)), "labels": torch.randint(labels, (many(),))}


@entry("ViT", "transformers", options=ATTENDING, size=Size(48, 8, 1))
def _vit(**options: Any) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**sized(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
                               image_size=16, patch_size=8, num_labels=3, **options))  # fmt: skip
    return ViTForImageClassification(config), _images()


@entry("Swin", "transformers", options=SWITCHED, size=Size(16, 4, 2))
def _swin(**_: Any) -> Any:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(**sized(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4],
                                window_size=4, num_labels=3))  # fmt: skip
    return SwinForImageClassification(config), _images()


@entry("ConvNeXt", "transformers", options=SWITCHED, size=Size(16, 4, 4))
def _convnext(**_: Any) -> Any:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(**sized(hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, num_labels=3, drop_path_rate=0.1,
                            layer_scale_init_value=0.5))  # fmt: skip
    return ConvNextForImageClassification(config), _images()


@entry("ResNet", "transformers", options=SWITCHED, kinked=True, size=Size(16, 4, 4))
def _resnet(**_: Any) -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        **sized(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic", num_labels=3)
    )
    return ResNetForImageClassification(config), _images()


@entry("RegNet", "transformers", options=SWITCHED, kinked=True, size=Size(16, 4, 4))
def _regnet(**_: Any) -> Any:
    from transformers import RegNetConfig, RegNetForImageClassification

    config = RegNetConfig(**sized(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, num_labels=3))
    return RegNetForImageClassification(config), _images()


@entry("MobileNet v2", "transformers", options=SWITCHED, kinked=True, size=Size(5, 2, 4))
def _mobilenet(**_: Any) -> Any:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(image_size=long(32), depth_multiplier=wide(1) * 0.2, depth_divisible_by=4, min_depth=4,
                               num_labels=3, finegrained_output=False)  # fmt: skip
    return MobileNetV2ForImageClassification(config), _images(32)


@entry("EfficientNet", "transformers", options=SWITCHED, size=Size(4, 6, 4))
def _efficientnet(**_: Any) -> Any:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(image_size=long(16), width_coefficient=wide(1) * 0.25, depth_coefficient=0.5,
                                hidden_dim=wide(320), in_channels=[32, 16], out_channels=[16, 24], kernel_sizes=[3, 5],
                                strides=[1, 2], num_block_repeats=[1, 2], expand_ratios=[1, 4], depthwise_padding=[],
                                num_labels=3)  # fmt: skip
    return EfficientNetForImageClassification(config), _images()


@entry("SegFormer", "transformers", options=SWITCHED, kinked=True, size=Size(16, 4, 2))
def _segformer(**_: Any) -> Any:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(**sized(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 12],
                             patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
                             decoder_hidden_size=8, num_labels=3))  # fmt: skip
    return SegformerForSemanticSegmentation(config), {
        "pixel_values": normal(many(), 3, long(16), long(16)),
        "labels": torch.randint(3, (many(), long(16), long(16))),
    }


@entry("DETR", "transformers", loss_fn=doubled(own_loss), options=ATTENDING, kinked=True, size=Size(16, 4, 2))
def _detr(attn_implementation: str, **_: Any) -> Any:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(**sized(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic",
                            out_features=["stage2"]))  # fmt: skip
    config = DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
                        d_model=wide(16), encoder_layers=1, decoder_layers=1, encoder_ffn_dim=wide(24),
                        decoder_ffn_dim=wide(24), encoder_attention_heads=4, decoder_attention_heads=4, num_queries=5,
                        num_labels=3,
                        attn_implementation={"": attn_implementation, "backbone_config": "eager"})  # fmt: skip
    labels = [
        {"class_labels": torch.tensor([1, 2]), "boxes": 0.3 + 0.3 * torch.rand(2, 4, dtype=torch.float64)},
        {"class_labels": torch.tensor([0]), "boxes": 0.3 + 0.3 * torch.rand(1, 4, dtype=torch.float64)},
    ]
    pixels = normal(many(), 3, long(32), long(32))
    return DetrForObjectDetection(config), {"pixel_values": pixels, "labels": labels * many(1)}


@entry("CLIP", "transformers", options={**ATTENDING, "mask": (True, False)}, size=Size(48, 8, 1))
def _clip(mask: bool, **options: Any) -> Any:
    from transformers import CLIPConfig, CLIPModel

    text = sized(**_SMALL, projection_dim=8)
    vision = sized(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, image_size=16,
                   patch_size=8, projection_dim=8)  # fmt: skip
    config = CLIPConfig(text_config={**text, **options}, vision_config={**vision, **options},
                        projection_dim=wide(8), **options)  # fmt: skip
    batch = {"input_ids": tokens(), "pixel_values": normal(many(), 3, long(16), long(16)), "return_loss": True}
    return CLIPModel(config), {**batch, "attention_mask": padding()} if mask else batch


@entry("Whisper", "transformers", options=ATTENDING, size=Size(48, 8, 1))
def _whisper(**options: Any) -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(**sized(vocab_size=VOCABULARY, num_mel_bins=8, d_model=16, encoder_layers=1,
                                   decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
                                   encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=10,
                                   max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                   decoder_start_token_id=1, begin_suppress_tokens=None, **options))  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    return model, {"input_features": normal(many(), wide(8), long(20)), "labels": tokens()}


@entry("Wav2Vec2 with CTC", "transformers", options={**ATTENDING, "mask": (True, False)}, size=Size(48, 16, 1))
def _wav2vec2(mask: bool, **options: Any) -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(**sized(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
                            intermediate_size=24, conv_dim=[8, 8], conv_stride=[4, 2], conv_kernel=[8, 3],
                            num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
                            mask_time_prob=0.0, layerdrop=0.0, pad_token_id=0, **options))  # fmt: skip
    batch = {"input_values": normal(many(), long(120)), "labels": torch.randint(1, 8, (many(), 3))}
    if mask:
        lengths = torch.ones(many(), long(120), dtype=torch.int64)
        lengths[-1, 100:] = 0
        batch["attention_mask"] = lengths
    return Wav2Vec2ForCTC(config), batch


# PEFT, diffusers, torch_geometric -------------------------------------------------------------------------------------


@entry("LoRA on Llama", "transformers", "peft", options=TEXT)
def _lora(mask: bool, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model, batch = _text("LlamaForCausalLM", "LlamaConfig", _GROUPED, mask, **options)
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    )
    for name, p in adapted.named_parameters():
        if "lora_B" in name:  # which begin at zero, where most of the curvature is, too
            nn.init.normal_(p, std=0.3)
    return adapted, batch


def denoising(model: Any, batch: Any) -> Tensor:
    """The error of predicted noise."""
    *inputs, noise = batch
    return F.mse_loss(model(*inputs).sample, noise)


@entry("U-Net", "diffusers", loss_fn=denoising, options=SWITCHED, size=Size(16, 2, 1))
def _unet(**_: Any) -> Any:
    from diffusers import UNet2DModel

    model = UNet2DModel(**sized(sample_size=8, in_channels=2, out_channels=2, layers_per_block=1,
                                block_out_channels=(8, 8), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                attention_head_dim=4, dropout=0.1, up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                                norm_num_groups=4))  # fmt: skip
    return model, (
        normal(many(), 2, long(8), long(8)),
        torch.tensor([3, 500] * many(1)),
        normal(many(), 2, long(8), long(8)),
    )


@entry("conditional U-Net", "diffusers", loss_fn=denoising, options=SWITCHED, size=Size(8, 2, 1))
def _conditional_unet(**_: Any) -> Any:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(**sized(sample_size=8, in_channels=2, out_channels=2, layers_per_block=1,
                                         norm_num_groups=4, block_out_channels=(8, 8),
                                         down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                         up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=6,
                                         attention_head_dim=4))  # fmt: skip
    return model, (
        normal(many(), 2, long(8), long(8)),
        torch.tensor([3, 500] * many(1)),
        normal(many(), long(3), wide(6)),
        normal(many(), 2, long(8), long(8)),
    )


def denoising_by_class(model: Any, batch: Any) -> Tensor:
    return denoising(functools.partial(model, **batch[1]), batch[0])


@entry(
    "DiT", "diffusers", loss_fn=doubled(denoising_by_class), options=SWITCHED, size=Size(64, 8, 1)
)  # it draws of the default type
def _dit(**_: Any) -> Any:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=wide(4), in_channels=2, out_channels=2,
                                  num_layers=1, sample_size=long(4), patch_size=2, num_embeds_ada_norm=10,
                                  norm_num_groups=2)  # fmt: skip
    given = {"timestep": torch.tensor([1, 5] * many(1)), "class_labels": torch.tensor([2, 3] * many(1))}
    latent, noise = normal(many(), 2, long(4), long(4)), normal(many(), 2, long(4), long(4))
    return model, ((latent, noise), given)


@entry(
    "image autoencoder",
    "diffusers",
    loss_fn=lambda model, x: F.mse_loss(model(x).sample, x),
    options=SWITCHED,
    size=Size(16, 2, 1),
)
def _autoencoder(**_: Any) -> Any:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(**sized(in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
                          up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 8), latent_channels=2,
                          norm_num_groups=2, sample_size=8))  # fmt: skip
    return model, normal(many(), 3, long(8), long(8))


def node_classes(model: Any, graph: Any) -> Tensor:
    """Cross-entropy of a graph's nodes."""
    x, edges, labels = graph
    return F.cross_entropy(model(x, edges), labels)


def _graph(kind: str, **settings: Any) -> Any:
    import torch_geometric.nn as pyg

    model = getattr(pyg, kind)(in_channels=wide(4), hidden_channels=wide(6), num_layers=2, out_channels=3, **settings)
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 2, 5, 6, 3], [1, 2, 3, 4, 5, 6, 0, 3, 6, 1, 2, 0]])
    edges = torch.cat([edges + 7 * copy for copy in range(many(1))], 1)
    return model, (normal(many(7), wide(4)), edges, torch.randint(3, (many(7),)))


for _kind, _settings in {
    "GCN": {"act": "tanh", "dropout": 0.2},
    "GAT": {"act": "elu", "heads": 2},
    "GIN": {"act": "relu", "norm": "batch_norm"},
    "GraphSAGE": {"act": "tanh"},
}.items():
    ZOO[_kind] = Entry(
        lambda kind=_kind, settings=_settings, **_: _graph(kind, **settings),
        node_classes,
        options=SWITCHED,
        kinked=_kind in ("GAT", "GIN"),  # leaky ReLU, ReLU
        needs=("torch_geometric",),
        size=Size(64, 1, 200),
    )


# torch's own ----------------------------------------------------------------------------------------------------------


def classes(model: Any, batch: Any) -> Tensor:
    """Cross-entropy of what a model gives for all that comes before the labels."""
    *inputs, labels = batch
    return F.cross_entropy(model(*inputs).flatten(0, -2), labels.flatten())


def squares(model: Any, batch: Any) -> Tensor:
    *inputs, target = batch
    return F.mse_loss(model(*inputs), target)


class PaddedEncoder(nn.Module):
    """torch's encoder with a mask of padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(wide(16), 4, wide(24), batch_first=True, activation="gelu")
        self.embedding, self.encoder = nn.Embedding(wide(VOCABULARY), wide(16)), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(wide(16), wide(VOCABULARY))

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        ignored = None if mask is None else mask == 0
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=ignored))


@entry("torch's encoder", loss_fn=classes, options={"mask": (True, False), **SWITCHED})
def _encoder(mask: bool, **_: Any) -> Any:
    return PaddedEncoder(), (tokens(), padding() if mask else None, tokens())


class Packed(nn.Module):
    """An LSTM over sequences of several lengths, packed."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.core = kind(wide(4), wide(5), num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(wide(10), 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.core(packed)[0], batch_first=True)[0].tanh())


def _sequences() -> Any:
    lengths = torch.tensor([3, 5, 2] * many(1)) * long(1)
    return normal(many(3), long(5), wide(4)), lengths, torch.randint(3, (many(3), long(5)))


@entry("packed LSTM", loss_fn=classes, options=SWITCHED, size=Size(64, 6, 8))
def _packed_lstm(**_: Any) -> Any:
    return Packed(nn.LSTM), _sequences()


@entry("packed GRU", loss_fn=classes, options=SWITCHED, size=Size(64, 6, 8))
def _packed_gru(**_: Any) -> Any:
    return Packed(nn.GRU), _sequences()


class Checkpointed(nn.Module):
    """Blocks whose values are computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        width = wide(8)
        self.first = nn.Linear(wide(4), width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(0.1), nn.GELU()) for _ in range(2)
        )
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        x = self.first(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.last(x)


def _points() -> tuple[Tensor, Tensor]:
    return normal(many(5), wide(4)), torch.randint(3, (many(5),))


@entry("checkpoints", loss_fn=classes, options={"reentrant": (False, True), **SWITCHED}, size=Size(64, 1, 64))
def _checkpointed(reentrant: bool, **_: Any) -> Any:
    return Checkpointed(reentrant), _points()


@entry("GPT-2 with checkpoints", "transformers", options={"train": (True,)})
def _checkpointed_gpt2(**_: Any) -> Any:
    model, batch = ZOO["GPT-2"].build(mask=True, attn_implementation="sdpa")
    model.gradient_checkpointing_enable()
    return model, batch


class Wrapped(nn.Module):
    """A layer between two others."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(wide(4), wide(6)), layer, nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(torch.tanh(self.first(x)))))


def _wrapped(layer: nn.Module) -> Any:
    model, batch = Wrapped(layer).double(), _points()
    model(batch[0])
    return model, batch


def _square() -> nn.Linear:
    return nn.Linear(wide(6), wide(6))


@entry("weight norm", loss_fn=classes, options=SWITCHED, size=Size(128, 1, 128))
def _weight_norm(**_: Any) -> Any:
    return _wrapped(nn.utils.parametrizations.weight_norm(_square()))


@entry(
    "spectral norm", loss_fn=classes, options=SWITCHED, kinked=True, size=Size(128, 1, 128)
)  # whose vectors count as constants
def _spectral_norm(**_: Any) -> Any:
    return _wrapped(nn.utils.parametrizations.spectral_norm(_square()))


@entry(
    "orthogonal weights", loss_fn=classes, options={"map": ("cayley", "matrix_exp"), **SWITCHED}, size=Size(64, 1, 64)
)
def _orthogonal(map: str, **_: Any) -> Any:
    return _wrapped(nn.utils.parametrizations.orthogonal(_square(), orthogonal_map=map))


@entry("EmbeddingBag", loss_fn=classes, options={"mode": ("mean", "sum", "max"), **SWITCHED}, size=Size(128, 1, 128))
def _embedding_bag(mode: str, **_: Any) -> Any:
    model = nn.Sequential(nn.EmbeddingBag(wide(10), wide(5), mode=mode), nn.Tanh(), nn.Linear(wide(5), 3))
    return model, (torch.randint(wide(10), (many(4), long(3))), torch.randint(3, (many(4),)))


class Fourier(nn.Module):
    """A layer that mixes frequencies, with weights for the real and the imaginary part."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.imaginary = (nn.Parameter(0.5 * normal(wide(6) // 2 + 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * torch.complex(self.real, self.imaginary), n=x.shape[-1])


@entry("Fourier layer", loss_fn=classes, options=SWITCHED, size=Size(128, 1, 128))
def _fourier(**_: Any) -> Any:
    return _wrapped(Fourier())


class Distances(nn.Module):
    """Gaussian features of the distances to centres."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(normal(wide(5), wide(6)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, self.centres))


@entry("distances (cdist)", loss_fn=classes, options=SWITCHED, size=Size(64, 1, 64))
def _distances(**_: Any) -> Any:
    return _wrapped(Distances())


class Solving(nn.Module):
    """A linear system and a determinant, whose matrix is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(normal(wide(6), wide(6)) + 3 * torch.eye(wide(6), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix, x.mT).mT + torch.linalg.slogdet(self.matrix)[1] / len(self.matrix)


@entry("linear solve, log-determinant", loss_fn=classes, options=SWITCHED, size=Size(64, 1, 64))
def _solving(**_: Any) -> Any:
    return _wrapped(Solving())


class Transformer(nn.Module):
    """A spatial transformer: an image resampled on a grid that is computed."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.pose, self.head = nn.Linear(long(8) ** 2, 6), nn.Linear(long(8) ** 2, 3)
        nn.init.normal_(self.pose.weight, std=0.02)
        self.pose.bias.data.copy_(torch.tensor([0.9, 0.1, 0.03, -0.12, 0.85, 0.02]))

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.pose(x.flatten(1)).view(-1, 2, 3), list(x.shape), align_corners=False)
        return self.head(F.grid_sample(x, grid, mode=self.mode, align_corners=False).flatten(1))


@entry("grid_sample", loss_fn=classes, options={"mode": ("bilinear",), **SWITCHED}, kinked=True, size=Size(1, 4, 16))
def _grid_sample(mode: str, **_: Any) -> Any:
    return Transformer(mode), (normal(many(3), 1, long(8), long(8)), torch.randint(3, (many(3),)))


def upsampled(model: Any, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@entry(
    "upsampling",
    loss_fn=upsampled,
    options={"mode": ("nearest", "bilinear", "bicubic", "area"), **SWITCHED},
    size=Size(16, 4, 4),
)
def _upsampling(mode: str, **_: Any) -> Any:
    body = [
        nn.Conv2d(1, wide(3), 3, padding=1),
        nn.Tanh(),
        nn.Upsample(scale_factor=2, mode=mode),
        nn.Conv2d(wide(3), 1, 3, padding=1),
    ]
    return nn.Sequential(*body), (
        normal(many(2), 1, long(5), long(5)),
        normal(many(2), 1, long(10), long(10)),
    )


@entry("group norm, channels last", loss_fn=upsampled, options=SWITCHED, size=Size(16, 8, 4))
def _group_norm(**_: Any) -> Any:
    body = [
        nn.Conv2d(wide(4), wide(8), 3, padding=1),
        nn.GroupNorm(4, wide(8)),
        nn.SiLU(),
        nn.Dropout(0.1),
        nn.Conv2d(wide(8), 2, 1),
    ]
    x, y = normal(many(2), wide(4), long(4), long(4)), normal(many(2), 2, long(4), long(4))
    return nn.Sequential(*body).to(memory_format=torch.channels_last), (
        x.contiguous(memory_format=torch.channels_last),
        y,
    )


class Recogniser(nn.Module):
    """An LSTM over frames, for CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.LSTM(wide(4), wide(6), batch_first=True), nn.Linear(wide(6), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0]).log_softmax(-1)


def transcription(model: Any, batch: Any) -> Tensor:
    x, labels, lengths, label_lengths = batch
    return F.ctc_loss(model(x).transpose(0, 1), labels, lengths, label_lengths)


@entry("LSTM with CTC", loss_fn=transcription, options=SWITCHED, size=Size(64, 6, 8))
def _ctc(**_: Any) -> Any:
    labels = torch.tensor([[1, 2, 2], [3, 1, 4]] * many(1))
    lengths, spoken = torch.tensor([9, 7] * many(1)) * long(1), torch.tensor([3, 2] * many(1))
    return Recogniser(), (normal(many(2), long(9), wide(4)), labels, lengths, spoken)


class CouplingFlow(nn.Module):
    """Coupling layers and a linear one between them (RealNVP)."""

    def __init__(self) -> None:
        super().__init__()
        n, m, self.copies = wide(4), wide(6), wide(1)
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(n, m), nn.Tanh(), nn.Linear(m, 2 * n)) for _ in range(2))
        self.mixing = nn.Parameter(torch.eye(n, dtype=torch.float64) + 0.2 * normal(n, n))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = x.new_zeros(len(x))
        for net, kept in zip(self.nets, ([1, 0, 1, 0], [0, 1, 0, 1]), strict=True):
            mask = x.new_tensor(kept * self.copies)
            scale, shift = net(x * mask).chunk(2, -1)
            scale = scale.tanh() * (1 - mask)
            x = (x * scale.exp() + shift * (1 - mask)) @ self.mixing
            volume = volume + scale.sum(-1) + torch.linalg.slogdet(self.mixing)[1]
        return x, volume


def likelihood(model: Any, x: Tensor) -> Tensor:
    z, volume = model(x)
    return -(torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) + volume).mean()


@entry("coupling flow", loss_fn=likelihood, options=SWITCHED, size=Size(128, 1, 128))
def _coupling_flow(**_: Any) -> Any:
    return CouplingFlow(), normal(many(5), wide(4))


class DiagonalStateSpace(nn.Module):
    """A convolution with the response of complex states (S4D), and the correlation of what it gives with itself."""

    def __init__(self, width: int, states: int = 2) -> None:
        super().__init__()
        self.decay, self.frequency = (nn.Parameter(normal(width, states)) for _ in range(2))
        self.readout, self.step = nn.Parameter(normal(width, states, 2)), nn.Parameter(normal(width) - 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        rates = torch.complex(-self.decay.exp(), self.frequency) * self.step.exp().unsqueeze(-1)
        powers = torch.exp(rates.unsqueeze(-1) * torch.arange(length, dtype=x.dtype))
        response = 2 * torch.einsum("hn,hnl->hl", torch.view_as_complex(self.readout) / rates, powers).real
        spectrum = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(response, n=2 * length)
        correlation = torch.fft.irfft((spectrum * spectrum.conj()).sqrt(), n=2 * length)[..., :length]
        return self.head(F.gelu(torch.fft.irfft(spectrum, n=2 * length)[..., :length] + correlation).mT)


@entry("complex state space", loss_fn=classes, options=SWITCHED, size=Size(32, 16, 4))
def _complex_states(**_: Any) -> Any:
    return DiagonalStateSpace(wide(3)), (normal(many(2), wide(3), long(6)), torch.randint(3, (many(2), long(6))))


def residual_of_heat(model: Any, points: Tensor) -> Tensor:
    """u_t = u_xx at some points, and u = sin πx at the beginning."""
    points = points.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
    (bend,) = torch.autograd.grad(slope[:, 0].sum(), points, create_graph=True)
    start = torch.stack([points[:, 0], torch.zeros_like(points[:, 0])], 1)
    return (slope[:, 1] - bend[:, 0]).square().mean() + (
        model(start)[:, 0] - (torch.pi * start[:, 0]).sin()
    ).square().mean()


@entry("physics-informed network", loss_fn=residual_of_heat, options=SWITCHED, size=Size(64, 1, 64))
def _physics(**_: Any) -> Any:
    return (
        nn.Sequential(nn.Linear(2, wide(6)), nn.Tanh(), _square(), nn.Tanh(), nn.Linear(wide(6), 1)),
        normal(many(6), 2),
    )


class DeepKernel(nn.Module):
    """A Gaussian process over features that are learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(2, wide(5)), nn.Tanh(), nn.Linear(wide(5), 2))
        self.scale, self.noise = nn.Parameter(normal(2)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> Tensor:
        z = self.features(x) * self.scale.exp()
        return torch.exp(-0.5 * torch.cdist(z, z).square()) + self.noise.exp() * torch.eye(len(x), dtype=x.dtype)


def marginal_likelihood(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return -torch.distributions.MultivariateNormal(torch.zeros_like(y), model(x)).log_prob(y)


@entry("deep kernel", loss_fn=marginal_likelihood, options=SWITCHED, size=Size(16, 1, 32))
def _deep_kernel(**_: Any) -> Any:
    return DeepKernel(), (normal(many(5), 2), normal(many(5)))


@entry("compiled module", loss_fn=classes, options=SWITCHED, size=Size(128, 1, 128))
def _compiled(**_: Any) -> Any:
    model, batch = _wrapped(_square())
    return torch.compile(model, backend="eager"), batch


def variants(name: str) -> list[dict[str, Any]]:
    """Every combination of an entry's options; the usual one first."""
    options = ZOO[name].options
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def make(name: str, *, size: Size = Size(), **options: Any) -> tuple[nn.Module, Callable[[Any, Any], Tensor], Any]:
    """A model in float64, its loss and a batch, so many times as large as usual; the random state is left alone.

    Scales and biases are moved off their special first values.
    """
    chosen = {key: values[0] for key, values in ZOO[name].options.items()} | options
    train = chosen.pop("train", True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _sizes.append(size)
        try:
            model, batch = ZOO[name].build(**chosen)
        finally:
            _sizes.pop()
        model = model.double().train(train)
        for key, p in model.named_parameters():
            if p.dim() == 1 and p.requires_grad and "pose" not in key:
                p.data += 0.1 * torch.randn_like(p)
    return model, ZOO[name].loss_fn, batch
