"""The detector of M2F2-Det (arXiv 2503.20188): CLIP's patches, a learned prompt and a CNN; both published fusions."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from llava.errors import CheckpointError
from llava.model.multimodal_encoder.clip_encoder import OPENAI_STD
from llava.systems.m2f2det.cnn import build_cnn, run_with_taps

_CLIP_PATCH = 14
FUSIONS = ("bridge", "cosine")
SCALAR_NORMS = ("layer_norm", "none")
TAP_SLICES = ("drop_last", "drop_cls")
CNN_INPUTS = ("clip", "residual")
PROMPTS = ("universal", "paper")
PROMPT_IN_LOSS = ("off", "map")
_LAYER_TOKEN_STD = 0.02
_RESIDUAL_GAIN, _RESIDUAL_LIMIT = 12.0, 3.0


@dataclass(frozen=True)
class DetectorConfig:
    """What a detector is built from. The defaults of the switches are those of the published weights.

    Attributes:
        fusion: ``bridge``, with a vision tower of its own, or ``cosine``, which takes another tower's features.
        cnn: Settings of the CNN, see ``cnn.build_cnn``.
        vision: Fields of ``CLIPVisionConfig``; of a cosine detector only ``hidden_size`` and ``num_patches``.
        text: Fields of ``CLIPTextConfig``.
        prompt_length: Learned prompt tokens.
        width: Width W of the projections.
        bridge_tokens: Tokens behind the last bridge step.
        bridge_dim: Width of the bridge's tokens.
        bridge_out: Width of the bridge's vector.
        bridge_heads: Attention heads of a bridge step.
        bridge_inner: Inner width of a bridge step's feed-forward.
        tap_widths: Channels of the CNN's taps.
        bridge_scalar_norm: ``layer_norm`` is the published norm over one number, which makes the bridge's vector the
            same for every image; ``none`` is the bridge at work.
        clip_taps: Hidden states of the vision tower that the bridge takes.
        cnn_input: What the CNN sees: ``clip`` (published), CLIP's normalised pixels; ``residual``, what is left of each
            colour behind a high pass, for a CNN that begins without weights and shall find small traces.
        clip_tap_slice: Which token of a CLIP tap is dropped: ``drop_last`` (published) or ``drop_cls``.
        prompt: What the patches are compared with: ``universal`` (published), learned tokens, the same for every image;
            ``paper``, as the paper says and the authors' code does not: behind them tokens made of the image and the
            words "forged face", and in every text layer learned tokens of its own.
        prompt_image_tokens: Tokens of a ``paper`` prompt that are made of the image.
        prompt_words: Its tokens of words.
        prompt_layer_tokens: Its learned tokens in each text layer.
        prompt_in_loss: What a bridge makes of its map: ``off`` (published), nothing, so that nothing trains the prompt;
            ``map``, as the paper says: the mean of a convolution over its tokens, each weighed by its patch's cosine.
    """

    fusion: str
    cnn: dict[str, Any]
    vision: dict[str, Any]
    text: dict[str, Any]
    prompt_length: int
    width: int
    bridge_tokens: int = 0
    bridge_dim: int = 0
    bridge_out: int = 0
    bridge_heads: int = 4
    bridge_inner: int = 32
    tap_widths: list[int] = field(default_factory=list)
    bridge_scalar_norm: str = "layer_norm"
    clip_taps: list[int] = field(default_factory=lambda: [6, 10, 14])
    clip_tap_slice: str = "drop_last"
    cnn_input: str = "clip"
    prompt: str = "universal"
    prompt_image_tokens: int = 0
    prompt_words: int = 0
    prompt_layer_tokens: int = 0
    prompt_in_loss: str = "off"

    def __post_init__(self) -> None:
        """Checks the switches.

        Raises:
            CheckpointError: A switch has an unknown value, or one that another excludes.
        """
        known = {
            "fusion": FUSIONS,
            "bridge_scalar_norm": SCALAR_NORMS,
            "clip_tap_slice": TAP_SLICES,
            "cnn_input": CNN_INPUTS,
            "prompt": PROMPTS,
            "prompt_in_loss": PROMPT_IN_LOSS,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise CheckpointError(f"{name} {getattr(self, name)!r} is unknown; known: {', '.join(values)}")
        self._check_prompt()

    def _check_prompt(self) -> None:
        """Refuses a prompt that cannot be built, or that nothing would train."""
        own = (self.prompt_image_tokens, self.prompt_words, self.prompt_layer_tokens)
        length = self.prompt_length + self.prompt_image_tokens + self.prompt_words
        places = self.text.get("max_position_embeddings", length)
        bridge, weighs = self.fusion == "bridge", self.prompt_in_loss == "map"
        works = self.bridge_scalar_norm == "none" and self.clip_tap_slice == "drop_cls"
        faults = (
            (
                self.prompt == "universal" and any(own),
                "prompt 'universal' has no tokens of images, words or layers; they need prompt 'paper'",
            ),
            (
                self.prompt == "paper" and min(own) < 1,
                "prompt 'paper' needs prompt_image_tokens, prompt_words and prompt_layer_tokens of at least 1",
            ),
            (length > places, f"a prompt of {length} tokens does not fit the {places} places of the text tower"),
            (
                self.prompt == "paper" and bridge and not weighs,
                "nothing would train the prompt 'paper' of a bridge; set prompt_in_loss to 'map'",
            ),
            (weighs and not bridge, "prompt_in_loss is of a bridge: a cosine detector has the map in its head anyway"),
            (
                weighs and bridge and not works,
                "prompt_in_loss 'map' needs a bridge at work: bridge_scalar_norm 'none' and clip_tap_slice 'drop_cls'",
            ),
        )
        for is_there, message in faults:
            if is_there:
                raise CheckpointError(message)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class DetectorOutput:
    """What a detector finds in B images.

    Attributes:
        logits: ``[B, 2]``, real and fake.
        head_input: ``[B, D]``, what the last layer took.
        text_feature: ``[1, T]``, the prompt behind the text tower; of a ``paper`` prompt ``[B, T]``.
        text: ``[1, W]`` or ``[B, W]``, projected.
        vision: ``[B, 1 + P, W]``, CLIP's tokens, projected.
        scores: ``[B, P]``, cosine of each patch with the prompt, -1..1: the forgery map, row by row.
        cnn_map: ``[B, C, h, w]``.
        cnn_pooled: ``[B, C]``.
        cnn: ``[B, W]``.
        parts: Inner tensors of the bridge, by name.
    """

    logits: Tensor
    head_input: Tensor
    text_feature: Tensor
    text: Tensor
    vision: Tensor
    scores: Tensor
    cnn_map: Tensor
    cnn_pooled: Tensor
    cnn: Tensor
    parts: Mapping[str, Tensor]

    @property
    def fake_probability(self) -> Tensor:
        """P(fake) in 0..1, ``[B]``."""
        return self.logits.float().softmax(-1)[:, 1]


class PromptEncoder(nn.Module):
    """Learned tokens through CLIP's text tower, without words and marks: one vector for every image."""

    def __init__(self, config: Mapping[str, Any], length: int) -> None:
        super().__init__()
        text_config = CLIPTextConfig(**{"bos_token_id": None, "eos_token_id": None, **config})
        self.prompt_tokens = nn.Parameter(torch.randn(1, length, text_config.hidden_size))
        self.model = nn.ModuleDict({"text_model": CLIPTextModel(text_config)})

    def forward(self, global_BC: Tensor) -> Tensor:
        """Returns ``[1, T]``, the last token behind the causal tower and its norm.

        Args:
            global_BC: CLIP's class token of each image, which this prompt does not depend on.
        """
        return self.read(self.prompt_tokens, None)

    def read(self, tokens_BLT: Tensor, layer_tokens: Tensor | None) -> Tensor:
        """Returns the last token behind the tower, ``[B, T]``.

        Args:
            tokens_BLT: The prompt, without positions.
            layer_tokens: ``[layers, n, T]`` that stand before it in each layer, without positions; None for none.
        """
        tower: Any = self.model["text_model"]
        own = 0 if layer_tokens is None else layer_tokens.shape[1]
        length = own + tokens_BLT.shape[1]
        hidden = tokens_BLT + tower.embeddings.position_embedding.weight[: tokens_BLT.shape[1]]
        mask = torch.full((length, length), float("-inf"), device=hidden.device, dtype=hidden.dtype).triu(1)
        for number, layer in enumerate(tower.encoder.layers):
            if layer_tokens is not None:
                hidden = torch.cat([layer_tokens[number].expand(len(hidden), -1, -1), hidden], dim=1)
            hidden = layer(hidden, attention_mask=mask[None, None])[:, own:]
        last: Tensor = tower.final_layer_norm(hidden)[:, -1]
        return last


class ForgeryPromptEncoder(PromptEncoder):
    """The paper's forgery prompt (arXiv 2503.20188, section 3), which is not in the authors' code: one vector an image.

    Universal tokens, tokens made of the image by a small network, and words, through a tower each of whose layers sees
    learned tokens of its own. What the paper leaves open is ours: the network's width, and where layers' tokens stand.

    Args:
        config: The detector's.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config.text, config.prompt_length)
        width = self.prompt_tokens.shape[2]
        tower: Any = self.model["text_model"]
        layers = len(tower.encoder.layers)
        self.image_prompt = nn.Sequential(
            nn.Linear(config.vision["hidden_size"], width),
            nn.GELU(),
            nn.Linear(width, config.prompt_image_tokens * width),
        )
        self.layer_tokens = nn.Parameter(_LAYER_TOKEN_STD * torch.randn(layers, config.prompt_layer_tokens, width))
        self.register_buffer("word_tokens", torch.randn(1, config.prompt_words, width))

    def forward(self, global_BC: Tensor) -> Tensor:
        """Returns ``[B, T]``, the prompt of each image behind the tower.

        Args:
            global_BC: CLIP's class token of each image.
        """
        batch, words = len(global_BC), cast(Tensor, self.word_tokens)
        of_image_BUT = self.image_prompt(global_BC).view(batch, -1, words.shape[2])
        parts = [self.prompt_tokens.expand(batch, -1, -1), of_image_BUT, words.expand(batch, -1, -1)]
        return self.read(torch.cat(parts, dim=1), self.layer_tokens)


class VisionEncoder(nn.Module):
    """CLIP's vision tower up to its last layer but one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"vision_model": CLIPVisionModel(CLIPVisionConfig(**config))})

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Returns the hidden states from the embeddings to the last layer but one, each ``[B, 1 + P, C]``."""
        tower: Any = self.model["vision_model"]
        states = [tower.pre_layrnorm(tower.embeddings(pixels))]
        for layer in tower.encoder.layers[:-1]:
            states.append(layer(states[-1], attention_mask=None))
        return states


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.Wqkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns ``[B, T, D]``."""
        batch, length, width = x_BTD.shape
        query, key, value = self.Wqkv(x_BTD).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class BridgeBlock(nn.Module):
    """One step of the bridge: attention and a small feed-forward, each normed behind its sum."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Dropout(dropout), nn.Linear(inner, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns ``[B, T, D]``."""
        x_BTD = self.norm1(x_BTD + self.dropout(self.attn(x_BTD)))
        out: Tensor = self.norm2(x_BTD + self.dropout(self.ffn(x_BTD)))
        return out


class BridgeHead(nn.Module):
    """From the bridge's tokens to one vector: a number a token, then a linear layer over all of them."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.scalar_norm = config.bridge_scalar_norm == "layer_norm"
        # The names and places are those of the published file.
        layers: list[nn.Module] = [nn.Identity(), nn.Linear(config.bridge_dim, 1)]
        self.bridge_adapter_proj = nn.Sequential(*layers, *([nn.LayerNorm(1)] if self.scalar_norm else []))
        self.bridge_adapter_reduction = nn.Sequential(
            nn.Linear(config.bridge_tokens, config.bridge_out), nn.LayerNorm(config.bridge_out)
        )

    def reduce(self, scalars_BT: Tensor) -> Tensor:
        """Returns ``[B, bridge_out]``."""
        out: Tensor = self.bridge_adapter_reduction(scalars_BT)
        return out

    def constant(self, batch: int) -> Tensor:
        """Returns what the published norm leaves of any tokens: its bias at every place, ``[B, T]``."""
        norm: Any = self.bridge_adapter_proj[2]
        first: Any = self.bridge_adapter_reduction[0]
        constant: Tensor = norm.bias.expand(batch, first.in_features)
        return constant


class MapHead(nn.Module):
    """From the bridge's tokens of the patches, each weighed by its patch in the map, to one vector, as in the paper."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.bridge_dim, config.bridge_out, 3, padding=1)

    def forward(self, tokens_BPD: Tensor, scores_BP: Tensor) -> Tensor:
        """Returns ``[B, bridge_out]``: the mean over places of conv(F ⊙ M)."""
        side = round(scores_BP.shape[1] ** 0.5)
        weighed_BDP = (tokens_BPD * scores_BP[..., None]).transpose(1, 2)
        mean: Tensor = self.conv(weighed_BDP.unflatten(2, (side, side))).mean((2, 3))
        return mean


class M2F2Detector(nn.Module):
    """Tells real from manipulated faces.

    Its tensors have the published names. Linear layers of the fusion begin as published, N(0, 0.01) with bias 0.

    Args:
        config: What it is built from.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.clip_vision_alpha = nn.Parameter(torch.tensor(0.5))
        self.clip_text_alpha = nn.Parameter(torch.tensor(4.0))
        universal = config.prompt == "universal"
        self.clip_text_encoder = (
            PromptEncoder(config.text, config.prompt_length) if universal else ForgeryPromptEncoder(config)
        )
        self.deepfake_encoder = build_cnn(config.cnn)
        width, clip_width = config.width, config.vision["hidden_size"]
        self.deepfake_proj = _projection(self.deepfake_encoder.width, width)
        self.text_proj = _projection(config.text["hidden_size"], width)
        self.vision_proj = _projection(clip_width, width)
        if config.fusion == "bridge":
            self.clip_vision_encoder = VisionEncoder(config.vision)
            for number, channels in enumerate(config.tap_widths, start=1):
                setattr(self, f"linear_{number}", nn.Linear(channels, config.bridge_dim))
            self.clip_reduction = nn.Linear(clip_width, config.bridge_dim)
            if config.prompt_in_loss == "map":
                self.map_head = MapHead(config)
            else:
                self.bridge_adapter_proj = BridgeHead(config)
            if config.bridge_scalar_norm == "none":
                self.bridge_adapter = nn.ModuleList(
                    BridgeBlock(config.bridge_dim, config.bridge_heads, config.bridge_inner) for _ in config.tap_widths
                )
        scored = config.bridge_out if config.fusion == "bridge" else config.vision["num_patches"]
        self.output = nn.Linear(scored + 2 * width, 2)
        self._initialize()

    def _initialize(self) -> None:
        fresh = [self.text_proj, self.vision_proj, self.output]
        if self.config.fusion == "bridge":
            taps = [getattr(self, f"linear_{n}") for n in range(1, len(self.config.tap_widths) + 1)]
            fresh += [self.clip_reduction, *taps]
            fresh += [self.bridge_adapter_proj] if self.config.prompt_in_loss == "off" else []
        for module in fresh:
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.01)
                    nn.init.zeros_(layer.bias)

    @property
    def image_size(self) -> int:
        """Side of the pixels; a cosine detector's follows from its patches, which have the size of CLIP's."""
        own = self.config.vision.get("image_size")
        return int(own or _CLIP_PATCH * round(self.config.vision["num_patches"] ** 0.5))

    def frozen_parts(self) -> list[Any]:
        """Returns what stage 1 does not train: CLIP's towers, and of a bridge what its answer does not depend on."""
        frozen: list[Any] = [self.clip_text_encoder.model]
        if self.config.fusion == "bridge":
            frozen.append(self.clip_vision_encoder)
            if self.config.prompt_in_loss == "off":
                frozen += [self.clip_text_encoder.prompt_tokens, self.text_proj]
            if self.config.bridge_scalar_norm == "layer_norm":
                head = self.bridge_adapter_proj.bridge_adapter_proj
                taps = [getattr(self, f"linear_{n}") for n in range(1, len(self.config.tap_widths) + 1)]
                frozen += [self.clip_reduction, head[1], head[2].weight, *taps]
        return frozen

    def forward(self, pixels: Tensor, clip_features: Tensor | None = None) -> DetectorOutput:
        """Analyses CLIP-normalised pixels ``[B, 3, S, S]``.

        Args:
            pixels: As CLIP's image processor makes them; the CNN gets the same.
            clip_features: ``[B, 1 + P, C]`` of the language model's tower, CLS first, for the cosine fusion.

        Raises:
            CheckpointError: A cosine detector got no features.
        """
        states: list[Tensor] = []
        if self.config.fusion == "bridge":
            states = self.clip_vision_encoder(pixels)
            clip_features = states[-1]
        if clip_features is None:
            raise CheckpointError("a cosine detector has no vision tower of its own: give it CLIP's features")
        text_feature = self.clip_text_encoder(clip_features[:, 0])
        text, vision = self.text_proj(text_feature), self.vision_proj(clip_features)
        scores = F.cosine_similarity(vision[:, 1:], text[:, None], dim=-1, eps=1e-8)
        seen = pixels if self.config.cnn_input == "clip" else residual(pixels)
        cnn_map, taps = run_with_taps(self.deepfake_encoder, seen)
        pooled = cnn_map.mean((2, 3))
        cnn = self.deepfake_proj(pooled)
        cls, parts = self.clip_vision_alpha * vision[:, 0], dict[str, Tensor]()
        if self.config.fusion == "bridge":
            parts = self._bridge(states, taps, scores)
            head_input = torch.cat([cls, parts["adapter"], cnn], dim=1)
        else:
            head_input = torch.cat([self.clip_text_alpha * scores, cls, cnn], dim=1)
        logits = self.output(head_input)
        return DetectorOutput(logits, head_input, text_feature, text, vision, scores, cnn_map, pooled, cnn, parts)

    def _bridge(self, states: list[Tensor], taps: list[Tensor], scores_BP: Tensor) -> dict[str, Tensor]:
        """Returns the bridge's vector ``adapter`` and, where its steps matter, what they took and gave."""
        if self.config.bridge_scalar_norm == "layer_norm":
            head = self.bridge_adapter_proj
            scalars = head.constant(len(taps[0]))
            return {"scalars": scalars, "adapter": self.clip_text_alpha * head.reduce(scalars)}
        tokens, parts = self._bridge_steps(states, taps)
        if self.config.prompt_in_loss == "map":
            # The last step's tokens end with one a patch, in the map's order.
            vector = self.map_head(tokens[:, -scores_BP.shape[1] :], scores_BP)
            return {**parts, "adapter": self.clip_text_alpha * vector}
        scalars = self.bridge_adapter_proj.bridge_adapter_proj(tokens).squeeze(-1)
        vector = self.bridge_adapter_proj.reduce(scalars)
        return {**parts, "scalars": scalars, "adapter": self.clip_text_alpha * vector}

    def _bridge_steps(self, states: list[Tensor], taps: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the tokens behind the last step ``[B, T, D]``, and what each step took and gave."""
        parts: dict[str, Tensor] = {}
        tokens = taps[0].new_zeros(len(taps[0]), 0, self.config.bridge_dim)
        for step, (layer, tap) in enumerate(zip(self.config.clip_taps, taps, strict=True)):
            own = getattr(self, f"linear_{step + 1}")(tap.flatten(2).transpose(1, 2))
            tokens = torch.cat([tokens, own, self.clip_reduction(self._clip_tap(states[layer]))], dim=1)
            parts[f"block{step}_in"] = tokens
            tokens = self.bridge_adapter[step](tokens)
            parts[f"block{step}_out"] = tokens
        return tokens, parts

    def _clip_tap(self, state: Tensor) -> Tensor:
        return state[:, :-1] if self.config.clip_tap_slice == "drop_last" else state[:, 1:]


def residual(pixels: Tensor) -> Tensor:
    """Returns the second difference of CLIP's pixels along both axes, ``[B, 3, S, S]`` within -3..3.

    Edges and smooth content all but vanish in it, while noise and the traces of generators stay.
    """
    std = torch.tensor(OPENAI_STD, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1)
    padded = F.pad(pixels * std, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 2:] - 2 * padded[..., 1:-1] + padded[..., :-2]
    both = across[..., 2:, :] - 2 * across[..., 1:-1, :] + across[..., :-2, :]
    return (_RESIDUAL_GAIN * both).clamp(-_RESIDUAL_LIMIT, _RESIDUAL_LIMIT)


def _projection(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), nn.LayerNorm(out))
