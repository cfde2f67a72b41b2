"""`SteerMoEForConditionalGeneration`: a frozen audio encoder, steered, read by a frozen language model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from steermoe_kernels import FusedSteerMoE, steer_encoder

from . import saved_model
from .audio_frames import FrameCounts
from .config import SteerMoEConfig, check_arguments, given_counts
from .fingerprint import Fingerprint
from .label_loss import IGNORED, chunked_cross_entropy
from .loading import Backbone, cast, freeze, load_encoder, load_language_model, load_tokenizer
from .logits_processors import with_unpadded_processors
from .run_checkpoints import CheckpointError

__all__ = ["SteerMoEForConditionalGeneration", "SteerMoEOutput"]

# What transformers' AutoModel and pipelines pass along, or their users do out of habit, and which changes nothing here.
_AUTO_ARGUMENTS = {"_commit_hash", "_from_auto", "_from_pipeline", "adapter_kwargs", "code_revision", "trust_remote_code"}
_AUTO_ARGUMENTS |= {"low_cpu_mem_usage", "use_safetensors", "weights_only"}


# What transformers calls a cache of keys and values, as an argument and in outputs, has changed between versions.
_CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"


@dataclass
class SteerMoEOutput(CausalLMOutputWithPast):
    """transformers' output of a causal language model: ``loss`` () in float32, with labels; ``logits`` (B, S, V), without.

    ``gates``: layer -> (clips, frames, E), where asked for; ``frame_mask`` (clips, frames), True where a frame is audio. Both are None for
    a batch without audio.
    """

    gates: dict[int, Tensor] | None = None
    frame_mask: Tensor | None = None


class SteerMoEForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """An audio encoder and a language model, both frozen, with a trained `FusedSteerMoE` between them (arXiv 2510.13558).

    ``encoder`` is steered in place; its pooled frames are projected to the language model's width and stand where the prompt has
    ``config.audio_token_id``. Both backbones are always in eval mode, and only ``aligner`` has gradients. Made by `from_backbones` with a
    new aligner, or by `from_pretrained`.
    """

    config_class = SteerMoEConfig
    config: SteerMoEConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SteerMoEConfig, encoder: nn.Module | None = None, language_model: nn.Module | None = None) -> None:
        """``encoder`` and ``language_model``: loaded from where ``config`` says if they are None."""
        self._begin(config)
        audio = load_encoder(_named(config, "audio_model") if encoder is None else encoder, revision=config.audio_revision)
        text = load_language_model(
            _named(config, "text_model") if language_model is None else language_model, revision=config.text_revision
        )
        self._join(audio, text)

    def _begin(self, config: SteerMoEConfig) -> None:
        """transformers' constructor, kept from the router's ``top_k``: it would take it for sampling's, and warn that it is ignored."""
        top_k, config.top_k = config.top_k, None
        try:
            super().__init__(config)
        finally:
            config.top_k = top_k

    def _join(self, audio: Backbone, text: Backbone) -> None:
        """Freeze the backbones and put a new aligner between them; record where they are from."""
        config, encoder, language_model = self.config, audio.module, text.module
        self.frame_counts = FrameCounts.of(encoder) if config.frame_counts is None else given_counts(config.frame_counts)
        width = language_model.get_input_embeddings().weight.shape[1]
        if config.audio_token_id is None:
            raise ValueError("config.audio_token_id is None: give the tokenizer's id of the audio token")
        freeze(encoder)
        freeze(language_model)
        aligner = FusedSteerMoE.for_encoder(
            encoder,
            config.num_experts,
            top_k=config.top_k,
            renormalize=config.renormalize,
            steering_scale=config.steering_scale,
            output_dim=width,
            backend=config.backend,
        )
        self.encoder = steer_encoder(encoder, aligner, pool=config.pool, pool_size=config.pool_size)
        self.language_model = language_model
        self.fingerprints: dict[str, Fingerprint] = {"audio": audio.fingerprint, "text": text.fingerprint}
        config.audio_model, config.audio_revision, config.audio_fingerprint = audio.name, audio.revision, audio.fingerprint.digest
        config.text_model, config.text_revision, config.text_fingerprint = text.name, text.revision, text.fingerprint.digest
        config.dtype = next(language_model.parameters()).dtype
        self.generation_config = language_model.generation_config
        self._no_split_modules = sorted(
            {name for part in (encoder, language_model) for name in getattr(part, "_no_split_modules", None) or ()}
        )
        # What the library's post_init would set; it would also initialise weights, and these are loaded.
        self.all_tied_weights_keys = {
            f"language_model.{key}": f"language_model.{tied}"
            for key, tied in (getattr(language_model, "all_tied_weights_keys", None) or {}).items()
        }
        self._head_is_plain: bool | None = None
        self.train(False)

    @classmethod
    def from_backbones(
        cls,
        audio_model: Any,
        text_model: Any,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        attn_implementation: str | None = None,
        **config: Any,
    ) -> SteerMoEForConditionalGeneration:
        """A model with a new aligner between two backbones: hub ids, paths, or modules, which become part of the model and are frozen.

        ``config`` holds fields of `SteerMoEConfig`. ``dtype`` (or ``torch_dtype``) is the backbones', float32 by default, "auto" for that
        of their files; the aligner is in float32 (float64 under a float64 encoder). A language model given as a module, and not from a hub
        or folder, needs ``audio_token_id``, the processor's; an encoder of a family that `FrameCounts.of` does not know, ``frame_counts``,
        which the processor needs, too. BackboneError if a backbone cannot be had; ValueError for a wrong setting,
        TypeError for one there is not.
        """
        fields = SteerMoEConfig.field_names()
        check_arguments("from_backbones", config, [*fields, "dtype", "torch_dtype", "device", "attn_implementation"])
        if dtype is None:
            dtype = torch.float32 if torch_dtype is None else torch_dtype
        settings = SteerMoEConfig(**config)
        audio = load_encoder(audio_model, revision=settings.audio_revision, attn_implementation=attn_implementation)
        text = load_language_model(text_model, revision=settings.text_revision, attn_implementation=attn_implementation)
        if settings.audio_token_id is None:
            if text.name is None:
                raise ValueError("text_model is a module of no known origin: give audio_token_id, the processor's, along with it")
            tokenizer = load_tokenizer(text.name, revision=text.revision, audio_token=settings.audio_token)
            settings.audio_token_id = tokenizer.convert_tokens_to_ids(settings.audio_token)
        return cls._assembled(settings, audio, text, dtype, device)

    @classmethod
    def _assembled(
        cls, config: SteerMoEConfig, audio: Backbone, text: Backbone, dtype: torch.dtype | str, device: torch.device | str | None
    ) -> SteerMoEForConditionalGeneration:
        if isinstance(dtype, str) and dtype != "auto":
            named = getattr(torch, dtype.removeprefix("torch."), None)
            if not isinstance(named, torch.dtype):
                raise ValueError(f"dtype must be a torch.dtype, the name of one, or 'auto', got {dtype!r}")
            dtype = named
        for backbone in (audio, text):
            if isinstance(dtype, torch.dtype):
                cast(backbone.module, dtype)
                if backbone.name is None:
                    # There is no file to go back to: what is known again is what has been used.
                    backbone.fingerprint = Fingerprint.of(backbone.module)
            if device is not None:
                backbone.module.to(device)
        model = cls.__new__(cls)
        model._begin(config)
        model._join(audio, text)
        return model

    @property
    def aligner(self) -> FusedSteerMoE:
        """The trained part. It is a submodule of the encoder, ``encoder.steering``."""
        aligner: Any = self.encoder.steering
        return aligner

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The aligner's parameters by name, as a checkpoint holds them; all others have no gradient."""
        return dict(self.aligner.named_parameters())

    def train(self, mode: bool = True) -> SteerMoEForConditionalGeneration:
        """Training mode for the model, and eval mode for the backbones all the same: their dropout must not come alive.

        In the aligner, which is part of the encoder, nothing depends on the mode.
        """
        super().train(mode)
        self.encoder.eval()
        self.language_model.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the language model is frozen, and its embeddings are never resized")

    def encode(
        self, input_features: Tensor, feature_lengths: Tensor | None = None, *, output_gates: bool = False
    ) -> tuple[Tensor, Tensor, dict[int, Tensor] | None, Tensor]:
        """Soft prompts from features: steered, pooled, projected.

        ``input_features`` as the processor makes them, one clip a row, and ``feature_lengths`` (clips,), in feature frames, None for full
        rows. Returns embeddings (clips, pooled frames, width of the language model), their counts (clips,), the gates as in
        `SteerMoEOutput`, or None, and the frame mask.
        """
        counts, size = self.frame_counts, self.config.pool_size
        features = input_features.to(device=self.aligner.steering_vectors.device, dtype=self.encoder_dtype)
        length = features.shape[counts.time_dim]
        if feature_lengths is None:
            feature_lengths = torch.full((features.shape[0],), length)
        lengths = feature_lengths.to(features.device)
        _check_lengths(lengths, features.shape[0], length)
        if self.config.audio_padding == "max_length" or self._masks_padding:
            frames, gates = self._encode_together(features, lengths, output_gates)
        else:
            frames, gates = self._encode_by_length(features, lengths, output_gates)
        heard = torch.arange(int(counts.frames(length)), device=lengths.device) < counts.frames(lengths)[:, None]
        return self.aligner.project(frames), counts.pooled(lengths, size), gates, heard

    @property
    def encoder_dtype(self) -> torch.dtype:
        """The dtype of the encoder's weights, and so of the features it takes."""
        return next(parameter.dtype for name, parameter in self.encoder.named_parameters() if not name.startswith("steering."))

    @property
    def _masks_padding(self) -> bool:
        """Whether the encoder takes clips of several lengths in one batch and gives for each what it gives for it alone.

        transformers' Whisper does, steered. What masks do in an encoder of another family is not known.
        """
        return self.config.frame_counts is None and self.frame_counts.layout == "mel" and hasattr(self.encoder, "config")

    def _encode_together(self, features: Tensor, lengths: Tensor, output_gates: bool) -> tuple[Tensor, dict[int, Tensor] | None]:
        mask = None
        if self.config.audio_padding == "longest":
            mask = torch.arange(features.shape[-1], device=lengths.device) < lengths[:, None]
        with self.aligner.record_gates() if output_gates else nullcontext() as gates:
            frames = self._frames_of(self.encoder(features) if mask is None else self.encoder(features, attention_mask=mask), features)
        return frames, gates

    def _encode_by_length(self, features: Tensor, lengths: Tensor, output_gates: bool) -> tuple[Tensor, dict[int, Tensor] | None]:
        """Clips of one length at a time, each without any padding: norms and convolutions over time would let it through."""
        counts = self.frame_counts
        longest = int(lengths.max())
        total, pooled = int(counts.frames(longest)), int(counts.pooled(longest, self.config.pool_size))
        order, parts, gate_parts = [], [], []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            with self.aligner.record_gates() if output_gates else nullcontext() as gates:
                clips = features[rows].narrow(counts.time_dim, 0, length)
                frames = self._frames_of(self.encoder(clips), clips)
            parts.append(_filled_up(frames, pooled))
            gate_parts.append({layer: _filled_up(gate, total) for layer, gate in (gates or {}).items()})
            order.append(rows)
        back = torch.cat(order).argsort()
        collected = {layer: torch.cat([part[layer] for part in gate_parts])[back] for layer in gate_parts[0]}
        return torch.cat(parts)[back], collected if output_gates else None

    def _frames_of(self, output: Any, features: Tensor) -> Tensor:
        """The pooled frames in the encoder's ``output``. ValueError if they are not as many as its counts say."""
        frames: Tensor = output if isinstance(output, Tensor) else output[0]
        length = features.shape[self.frame_counts.time_dim]
        if frames.shape[1] != (expected := self.frame_counts.pooled(length, self.config.pool_size)):
            raise ValueError(
                f"frame_counts give {expected} pooled frames for {length} feature frames, and the encoder puts out {frames.shape[1]}"
            )
        return frames

    def _embed(
        self, input_ids: Tensor, input_features: Tensor | None, feature_lengths: Tensor | None, output_gates: bool = False
    ) -> tuple[Tensor, dict[int, Tensor] | None, Tensor | None]:
        """The prompt's embeddings (B, S, D), with the audio in its places."""
        audio_token: Any = self.config.audio_token_id
        places = input_ids.eq(audio_token)
        with torch.no_grad():
            # The audio token may lie outside the table, and what the table holds there is not used.
            embeds = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
        wanted = int(places.sum())
        if input_features is None or input_features.shape[0] == 0:
            if wanted:
                raise ValueError(f"input_ids holds {wanted} audio tokens, and input_features is missing")
            return embeds, None, None
        soft, counts, gates, heard = self.encode(input_features, feature_lengths, output_gates=output_gates)
        valid = torch.arange(soft.shape[1], device=counts.device) < counts[:, None]
        soft = soft[valid].to(device=embeds.device, dtype=embeds.dtype)
        if soft.shape[0] != wanted:
            raise ValueError(
                f"input_ids holds {wanted} audio tokens, and the clips give {soft.shape[0]} pooled frames: "
                "make both with this model's processor, with its pool_size"
            )
        return embeds.masked_scatter(places[..., None], soft), gates, heard

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_gates: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SteerMoEOutput:
        """``input_ids``, ``attention_mask``, ``labels`` (B, S); ``input_features`` and ``feature_lengths`` of all clips, in their order.

        With ``labels`` (-100 where there is none) only the positions that predict one go through the language model's head, a chunk at a
        time, and ``loss`` is their mean cross entropy, or their sum over ``num_items_in_batch``. Without, ``logits`` are the language
        model's. ``kwargs`` go to the language model. ValueError if audio tokens and clips do not fit together.
        """
        embeds, gates, heard = self._embed(input_ids, input_features, feature_lengths, output_gates)
        inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": attention_mask, **kwargs}
        if attention_mask is not None and "position_ids" not in inputs and _accepts(self.language_model, "position_ids"):
            # Padding does not count, on either side.
            inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        if labels is not None:
            loss = self._loss(inputs, labels, num_items_in_batch)
            if heard is None and torch.is_grad_enabled():
                # No audio, no gradient; a trainer expects one all the same, and from every process.
                loss = loss + 0.0 * sum(p.sum() for p in self.trained_parameters().values() if p.requires_grad)
            return SteerMoEOutput(loss=loss, gates=gates, frame_mask=heard)
        if past_key_values is not None:
            inputs[_CACHE] = past_key_values
        outputs = self.language_model(**inputs, use_cache=use_cache)
        kept = {name: outputs.get(name) for name in (_CACHE, "hidden_states", "attentions")}
        return SteerMoEOutput(logits=outputs.logits, gates=gates, frame_mask=heard, **kept)

    def _loss(self, inputs: dict[str, Any], labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        if labels.shape != inputs["inputs_embeds"].shape[:2]:
            raise ValueError(f"labels must have input_ids' shape {tuple(inputs['inputs_embeds'].shape[:2])}, got {tuple(labels.shape)}")
        predicting = labels[:, 1:] != IGNORED
        targets = labels[:, 1:][predicting]
        config = self.language_model.config.get_text_config()
        if self._logits_are_heads_of_states(inputs["inputs_embeds"]):
            states = self.language_model.get_decoder()(**inputs, use_cache=False)[0]
            states = states[:, :-1][predicting.to(states.device)]
            total = chunked_cross_entropy(states, targets.to(states.device), self._head, config.vocab_size)
        else:
            logits = self.language_model(**inputs, use_cache=False).logits[:, :-1]
            logits = logits[predicting.to(logits.device)]
            total = chunked_cross_entropy(logits, targets.to(logits.device), lambda part: part, logits.shape[-1])
        divisor = targets.numel() if num_items_in_batch is None else num_items_in_batch
        if isinstance(divisor, Tensor):
            divisor = divisor.to(total.device)
        return total / (divisor if isinstance(divisor, Tensor) else max(1, divisor))

    def _head(self, states: Tensor) -> Tensor:
        """Logits of the language model's last hidden states, as its own forward computes them: scaled or capped where it does so."""
        config = self.language_model.config.get_text_config()
        logits = self.language_model.get_output_embeddings()(states)
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        if scaling := getattr(config, "logits_scaling", None):
            logits = logits / scaling
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.no_grad()
    def _logits_are_heads_of_states(self, embeds: Tensor) -> bool:
        """Whether `_head` is how this language model comes to its logits; asked once. Of one that does more, the full logits are taken."""
        if self._head_is_plain is None:
            probe = {"inputs_embeds": embeds[:1, :2].detach(), "use_cache": False}
            try:
                states = self.language_model.get_decoder()(**probe)[0]
                logits, own = self._head(states).float(), self.language_model(**probe).logits.float()
            except (AttributeError, TypeError):
                self._head_is_plain = False
            else:
                self._head_is_plain = logits.shape == own.shape and bool(torch.allclose(logits, own, rtol=1e-3, atol=1e-3))
        return self._head_is_plain

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """New tokens (B, up to max_new_tokens), without the prompt's. ``kwargs`` are those of transformers' ``generate``.

        ``repetition_penalty`` is for tokens that repeat new ones, not the prompt's.
        ``min_length`` counts a row's prompt without padding, ``max_length``, as transformers does, with it.

        The batch must be padded on the left, as the processor pads prompts without answers: ValueError otherwise. Without
        ``attention_mask`` the pad tokens that rows begin with are padding: ValueError for several rows where that cannot be told.
        """
        if attention_mask is None:
            attention_mask = self._mask_of(input_ids, kwargs)
        elif not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask ends in padding, and generation continues at the end: pad on the left")
        embeds, _, _ = self._embed(input_ids, input_features, feature_lengths)
        own = kwargs.get("generation_config") or self.generation_config
        if own.pad_token_id is None and "pad_token_id" not in kwargs:
            end = kwargs.get("eos_token_id", own.eos_token_id)
            kwargs["pad_token_id"] = end[0] if isinstance(end, (list, tuple)) else end
        if "generation_config" not in kwargs and self.generation_config is not self.language_model.generation_config:
            kwargs["generation_config"] = self.generation_config  # another one was assigned
        settings = with_unpadded_processors(kwargs, self.language_model.generation_config, attention_mask)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **settings)

    def _mask_of(self, input_ids: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """(B, S): 0 for the pad tokens that rows begin with."""
        # Settings given for this call may leave out what the model's own say, and those what the language model's config does.
        configs = (settings.get("generation_config"), self.generation_config, self.language_model.config.get_text_config())

        def token(name: str) -> Any:
            named = (settings.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in named if value is not None), None)

        pad, end, begin = token("pad_token_id"), token("eos_token_id"), token("bos_token_id")
        mask = torch.ones_like(input_ids)
        if pad is None:
            if len(input_ids) > 1:
                raise ValueError(
                    "attention_mask is missing, and the language model names no pad token: give the processor's attention_mask"
                )
            return mask
        begins, ends = input_ids[:, 0] == pad, input_ids[:, -1] == pad
        if bool(ends.any()) and pad not in (end if isinstance(end, (list, tuple)) else [end]):
            raise ValueError("input_ids end in padding, and generation continues at the end: pad on the left")
        # The longest row has no padding. If it begins with the pad token too, that token is what texts begin with.
        if bool(begins.all()) and pad == begin:
            if len(input_ids) > 1:
                raise ValueError(
                    f"attention_mask is missing, and token {pad} is both padding and what texts begin with: give attention_mask"
                )
            return mask
        return mask * (input_ids != pad).cumsum(-1).ne(0)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the trained weights, the model's and generation's configs, the backbones' fingerprints and a model card.

        As `saved_model.write` does. ``state_dict``: gathered weights of this model, where they are sharded. ``push_to_hub`` and what
        it takes are transformers'.
        """
        if not is_main_process:
            return
        weights = _aligner_part(state_dict) if state_dict is not None else self.aligner.state_dict()
        saved_model.write(save_directory, self.config, weights, self.fingerprints, self.generation_config)
        if push_to_hub:
            wanted = ("commit_message", "private", "token", "revision", "create_pr", "tags")
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, **{key: value for key, value in kwargs.items() if key in wanted})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: SteerMoEConfig | None = None,
        audio_model: Any = None,
        text_model: Any = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: torch.device | str | None = None,
        attn_implementation: str | None = None,
        backend: str | None = None,
        revision: str | None = None,
        check_backbones: bool = True,
        **kwargs: Any,
    ) -> SteerMoEForConditionalGeneration:
        """Put a model together again from a folder or hub repository that `save_pretrained` filled, and the backbones it names.

        ``audio_model`` and ``text_model`` say where the backbones are now: hub ids, paths or modules. ``dtype`` (or ``torch_dtype``) is the
        backbones', by default what they had when the checkpoint was saved, "auto" for that of their files; ``device`` (or ``device_map``,
        one device) is for all of it. ``check_backbones`` False leaves the backbones' fingerprints uncompared, for who has just done so.
        ``kwargs`` are what hubs take: ``token``, ``cache_dir``, ``local_files_only``, ``subfolder``; TypeError for others.

        CheckpointError for a checkpoint that is cut off or damaged, or whose aligner was trained for other backbones than these, naming
        both: other weights, or other settings where the checkpoint records them; BackboneError for a backbone that cannot be had.
        """
        own = [
            name for name in inspect.signature(cls.from_pretrained).parameters if name not in ("pretrained_model_name_or_path", "kwargs")
        ]
        check_arguments("from_pretrained", kwargs.keys() - _AUTO_ARGUMENTS, [*own, *saved_model.HUB_ARGUMENTS])
        if dtype is None:
            dtype = torch_dtype
        saved = saved_model.read(pretrained_model_name_or_path, revision=revision, **kwargs)
        settings = saved.config if config is None else config
        if backend is not None:
            settings.backend = backend
        if dtype is None:
            dtype = settings.dtype or torch.float32
        audio_revision = settings.audio_revision if audio_model is None else None
        text_revision = settings.text_revision if text_model is None else None
        audio = load_encoder(
            _named(settings, "audio_model") if audio_model is None else audio_model,
            revision=audio_revision,
            attn_implementation=attn_implementation,
        )
        text = load_language_model(
            _named(settings, "text_model") if text_model is None else text_model,
            revision=text_revision,
            attn_implementation=attn_implementation,
        )
        for kind, trained_for, backbone in (("audio", settings.audio_model, audio), ("text", settings.text_model, text)):
            if check_backbones:
                _check_same(saved.folder, kind, trained_for, saved.fingerprints[kind], backbone)
            backbone.fingerprint = saved.fingerprints[kind]
        model = cls._assembled(settings, audio, text, dtype, device if device is not None else device_map)
        try:
            model.aligner.load_state_dict(saved.weights)
        except RuntimeError as error:
            raise CheckpointError(f"{saved.folder} does not fit its own config: {error}") from error
        if saved.generation_config is not None:
            model.generation_config = model.language_model.generation_config = saved.generation_config
        return model


def _named(config: SteerMoEConfig, field: str) -> str:
    name: str | None = getattr(config, field)
    if name is None:
        raise ValueError(f"the checkpoint does not say where its {field} is, which was given as a module: give {field}")
    return name


def _check_same(folder: str, kind: str, trained_for: str | None, fingerprint: Fingerprint, backbone: Backbone) -> None:
    found = fingerprint.matching(backbone.module)
    changed = fingerprint.changed_settings(found)
    if found.digest == fingerprint.digest and not changed:
        return
    argument = f"{kind}_model"
    if found.digest == fingerprint.digest:
        raise CheckpointError(
            f"{folder} was trained for the {argument} {trained_for or 'given as a module'!r}, and {backbone.name or 'the module given'!r} "
            f"has its weights under other settings: {'; '.join(changed)}; give the {argument} it was trained for"
        )
    differences = fingerprint.differences(found)
    more = f" and {len(differences) - 1} more differences" if len(differences) > 1 else ""
    raise CheckpointError(
        f"{folder} was trained for the {argument} {trained_for or 'given as a module'!r} with fingerprint {fingerprint.digest[:12]}, and "
        f"{backbone.name or 'the module given'!r} has {found.digest[:12]}: {differences[0]}{more}; give the {argument} it was trained for"
    )


def _aligner_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "encoder.steering."
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def _accepts(module: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(module.forward).parameters


def _filled_up(x: Tensor, length: int) -> Tensor:
    """``x`` (B, T, D) with zeros up to ``length`` frames."""
    return nn.functional.pad(x, (0, 0, 0, length - x.shape[1]))


def _check_lengths(lengths: Tensor, clips: int, longest: int) -> None:
    if lengths.shape != (clips,):
        raise ValueError(f"feature_lengths must be ({clips},), one a clip, got {tuple(lengths.shape)}")
    if clips and not 1 <= int(lengths.min()) <= int(lengths.max()) <= longest:
        raise ValueError(f"feature_lengths must be between 1 and input_features' {longest} frames, got {lengths.tolist()}")
