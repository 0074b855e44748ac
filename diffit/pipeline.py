"""DiffiT as a pipeline of diffusers, and on the Hub.

    pipeline = DiffiTPipeline.from_pretrained("Diffit-Fashion")
    images = pipeline(["Sneaker", "Bag"]).images

`python -m diffit.pipeline CHECKPOINT FOLDER` writes any checkpoint as a folder that diffusers reads:

    model_index.json    the components, and what the checkpoint recommends: process, sampling, guidance, class names
    transformer/, vae/  config.json and weights (safetensors); image-space models have no VAE
    README.md           the model card, with a picture of samples; two small modules for plain diffusers
"""

from __future__ import annotations

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    from diffit.cli.run import imported

    raise SystemExit(imported("diffit.cli.pipeline:main")())

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import is_accelerate_available
from huggingface_hub import create_repo, upload_folder
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffit import components, hub
from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.resolve import PIPELINE_FILE, Source, damaged_pipeline, find_checkpoint
from diffit.checkpoint.weights import load_weights
from diffit.codec import VAECodec, create_codec
from diffit.components import MODULE_SOURCE, NETWORK_MODULE, PIPELINE_MODULE, Transformer, as_component
from diffit.sampling.folder import draw_grid, save_png
from diffit.sampling.images import ImageSampler, changed
from diffit.sampling.labels import class_names, known_labels, resolve_labels
from diffit.system.console import progress
from diffit.system.files import as_tree, explained_write, first_line, quiet_hub, write_atomically

_BATCH_SIZE = 16
# Arguments of other pipelines -> what this one has in their place.
_OF_OTHERS = {
    "generator": ": pass seed, on which with the number of an image all its noise depends",
    "latents": ": noise follows from seed; pass that",
    "num_images_per_prompt": ": pass num_images, of which the labels take turns",
}


class DiffiTPipeline(DiffusionPipeline):
    """From class labels to images, as `diffit.sample_images` and sample.py draw them.

    Args:
        transformer: the network, which sees latents or pixels.
        vae: from latents to pixels; None in image space.
        checkpoint: what a `CheckpointConfig` says beside the network, as JSON has it.
        card: what the model card says beside that: `license` (a Hub id of one) and `scores` (of the evaluator).
    """

    _optional_components: ClassVar[list[str]] = ["vae"]
    _interrupt = False  # set it to stop, as in other pipelines

    def __init__(
        self,
        transformer: Transformer,
        vae: AutoencoderKL | AutoencoderTiny | None,
        checkpoint: dict[str, Any] | None = None,
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if checkpoint is None:
            raise ValueError("the checkpoint's settings are missing: make it with DiffiTPipeline.from_pretrained")
        if vae is not None and vae.config.latent_channels != transformer.config.in_channels:
            raise ValueError(
                f"the VAE has {vae.config.latent_channels} latent channels, {checkpoint['model']} needs "
                f"{transformer.config.in_channels}: leave vae out, or give one that fits"
            )
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(checkpoint=checkpoint, card=card or {"license": "unknown", "scores": {}})
        sizes = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
        self._settings = CheckpointConfig.from_json(json.dumps(checkpoint | {"network": sizes}))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | Tensor | NDArray[Any] | int | str | None = None,
        num_inference_steps: int | str | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        output_type: str = "pil",
        *,
        num_images: int | None = None,
        sampler: str | None = None,
        guide: str | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        **others: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images, 16 at a time; what is None, the checkpoint recommends.

        Args:
            class_labels: numbers or names of classes, one an image; drawn at random by default.
            num_inference_steps, guidance_scale, sampler, guide: num_sampling_steps, cfg_scale, sampler, guide of
                `sample_images`.
            seed: image i depends on (seed, i) and the settings alone.
            output_type: "pil" (a list of pictures), "np" (float32 [N, H, W, C] in 0..1), "pt" (the same as a tensor
                [N, C, H, W] on the pipeline's device) or "latent" (what the network sees, float32 [N, c, h, w]).
            num_images: N, with the labels repeated in turn; by default as many as there are labels, or one.
            return_dict: False for a tuple in place of an `ImagePipelineOutput`.
            callback_on_step_end: called with (pipeline, step, None, {"latents": x}) after every step of every batch,
                steps counted from 0. x [B, c, h, w] is a copy: the state cannot be replaced. Where it sets
                `pipeline._interrupt`, sampling stops, and images are returned as far as they are.

        Raises:
            ValueError: in one sentence, if a setting does not fit the model, or there is no such class.
            TypeError: for an argument of other pipelines.
        """
        for name in others:
            raise TypeError(f"DiffiTPipeline takes no {name}" + _OF_OTHERS.get(name, ""))
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"there is no output_type '{output_type}': choose pil, np, pt or latent")
        classes = resolve_labels(class_labels, class_names(self._settings))
        count = num_images if num_images is not None else 1 if class_labels is None else len(classes)
        if count < 1:
            raise ValueError(f"num_images must be at least 1, not {count}")
        if self.transformer.training:
            raise ValueError("the network is in training mode: call pipeline.transformer.eval() first")
        config = changed(self._settings, sampler, num_inference_steps, guidance_scale, guide=guide)
        device, dtype = self._execution_device, self.transformer.dtype
        codec = create_codec(config.codec, device, vae=self.vae)
        pictures = ImageSampler.create(self.transformer, config, device, codec=codec)
        # Weights of 16 bits multiply in theirs; norms, guidance and sampler stay in float32.
        autocast = torch.autocast(device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16))
        with autocast:
            images = self._draw(pictures, count, seed, classes, callback_on_step_end)
            output: Any = torch.cat([x if output_type == "latent" else codec.decode(x) for x in images])
        if output_type != "latent":
            output = output.permute(0, 3, 1, 2) / 255  # [N, C, H, W]
        output = VaeImageProcessor(do_normalize=False).postprocess(output, output_type)
        return ImagePipelineOutput(images=output) if return_dict else (output,)

    def _draw(
        self, pictures: ImageSampler, count: int, seed: int, classes: list[int], callback: Callable[..., Any] | None
    ) -> Iterator[Tensor]:
        """What the network sees of the samples [B, c, h, w], batch by batch, until the callback interrupts."""
        self._interrupt, starts = False, range(0, count, _BATCH_SIZE)
        with progress(total=len(starts), **getattr(self, "_progress_bar_config", {})) as bar:
            for start in starts:
                indices = range(start, min(start + _BATCH_SIZE, count))
                for state in pictures.states(indices, pictures.labels(indices, seed, classes), seed):
                    bar.total = state.num_steps * len(starts)
                    bar.update()
                    x = state.x.clone() if callback else state.x
                    returned = callback(self, state.step - 1, None, {"latents": x}) if callback else None
                    if returned and returned.get("latents", x) is not x:
                        raise ValueError("the callback returned other latents: the sampler's state cannot be replaced")
                    if self._interrupt:
                        break
                yield state.x
                if self._interrupt:
                    return

    def _refuse_scheduler(self, scheduler: Any) -> None:
        raise ValueError("DiffiTPipeline has samplers in place of schedulers: pass sampler='dpm++', say, at the call")

    scheduler = property(fset=_refuse_scheduler)

    def enable_model_cpu_offload(self, *_: Any, **others: Any) -> None:
        raise ValueError(
            "DiffiTPipeline offers no offloading: move it by pipeline.to(device), in 16 bits to save memory"
        )

    enable_sequential_cpu_offload = enable_model_cpu_offload

    @property
    def labels(self) -> dict[str, int]:
        """The classes: name -> number; ImageNet's synonyms too, and no name that several classes have."""
        return known_labels(class_names(self._settings))

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Numbers of classes, for their names. Raises ValueError if there is no such class."""
        return resolve_labels(label, class_names(self._settings))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> DiffiTPipeline:
        """The pipeline of a checkpoint, or one that was saved.

        Args:
            pretrained_model_name_or_path: all that `diffit.load_model` takes: a bundled or released name, a file, the
                folder of a run, of a checkpoint or of a saved pipeline, or a pipeline or file on the Hub.
            kwargs: dtype (or torch_dtype); vae; settings of the Hub's client, as revision; saved pipelines take all
                that diffusers does.

        Raises:
            ValueError: in one sentence, if it cannot be found, is damaged or does not fit.
        """
        client = {key: kwargs.pop(key) for key in hub.DOWNLOAD_SETTINGS if key in kwargs}
        name = os.fspath(pretrained_model_name_or_path)
        source, config = find_checkpoint(path=name, door="from_pretrained", **client)
        folder = source.path.parent if source.path else Path()
        if source.path is None or not (folder / PIPELINE_FILE).is_file():
            return cls._from_checkpoint(name, source, config, **kwargs)
        kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())  # which it needs
        try:
            return super().from_pretrained(str(folder), **kwargs)
        except Exception as error:  # safetensors, json, diffusers: each has its own kinds
            raise damaged_pipeline(folder, error) from error

    @classmethod
    def _from_checkpoint(
        cls, name: str, source: Source, config: CheckpointConfig, vae: AutoencoderKL | None = None, **kwargs: Any
    ) -> DiffiTPipeline:
        dtypes = [kwargs.pop(key, None) for key in ("dtype", "torch_dtype")]
        if kwargs:
            raise ValueError(f"{source} is a checkpoint, not a saved pipeline: it takes no {', '.join(kwargs)}")
        model = load_weights(source.fetch(), config)
        codec = create_codec(config.codec, torch.device("cpu"), vae=vae)
        checkpoint = {key: value for key, value in as_tree(config).items() if key != "network"}
        vae = codec.vae if isinstance(codec, VAECodec) else None
        pipeline = cls(as_component(model, config.network), vae, checkpoint, hub.card_facts(name, source, config))
        dtype = dtypes[0] or dtypes[1]
        return pipeline.to(dtype=dtype) if dtype else pipeline  # diffusers warns of every cast

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """The content of model_index.json; the modules that it names are those of this package, not the folder's."""
        index = super().load_config(pretrained_model_name_or_path, **kwargs)
        content = index[0] if isinstance(index, tuple) else index
        content["_class_name"] = cls.__name__
        content["transformer"] = [components.__name__, content["transformer"][1]]
        return index

    def to_json_string(self) -> str:
        """The content of model_index.json: the modules that it names are those that `save_pretrained` writes."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = [PIPELINE_MODULE, DiffiTPipeline.__name__]
        index["transformer"] = [NETWORK_MODULE, index["transformer"][1]]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], repo_id: str | None = None, **kwargs: Any
    ) -> None:
        """Write the pipeline as a folder that `from_pretrained` and diffusers read; model_index.json comes last.

        repo_id: what its model card calls it, by default the folder's name; kwargs: variant, max_shard_size.

        Raises:
            ValueError: in one sentence, if it cannot be written.
        """
        folder = Path(save_directory).expanduser()
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained writes a folder: call push_to_hub(repo_id) to upload it")
        size = sum(parameter.numel() for parameter in self.transformer.parameters())
        picture = self._picture() if size < 2e7 or self.device.type != "cpu" else None  # large ones take hours there
        facts = self.config["card"] | {"picture": picture is not None}
        card = hub.model_card(self._settings, repo_id or folder.resolve().name, size, **facts)
        modules = (f"{PIPELINE_MODULE}.py", f"transformer/{NETWORK_MODULE}.py")
        files = {"README.md": card} | dict.fromkeys(modules, MODULE_SOURCE)
        with explained_write(f"the pipeline to {folder}", "choose another"):
            (folder / "transformer").mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                write_atomically(folder / name, text.encode())
            if picture is not None:
                save_png(folder / hub.SAMPLES, picture)
            if self.vae is not None:  # sampling laid its decoder out for convolutions, which old diffusers cannot save
                self.vae.decoder.to(memory_format=torch.contiguous_format)
            super().save_pretrained(str(folder), **kwargs)

    def _picture(self) -> Image.Image | None:
        """Eight images for the card, of classes from the first to the last; none where they cannot be drawn."""
        names = class_names(self._settings)
        labels = [i * len(names) // 8 for i in range(8)] if names else None
        with contextlib.suppress(ValueError, RuntimeError):  # in training mode, say, or not finite
            images = self(labels, num_images=8, output_type="np", return_dict=False)[0]
            titles = [names[label] for label in labels] if labels else 8 * [""]
            return draw_grid([(255 * image).round().astype(np.uint8) for image in images], titles)
        return None

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload DiffiTPipeline",
        **kwargs: Any,
    ) -> str:
        """Upload what `save_pretrained` writes, which takes the other arguments; returns the repository's address.

        Raises:
            ValueError: in one sentence, if the Hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, repo_id=repo_id, **kwargs)
            try:
                with quiet_hub(None):
                    name = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
                    done = upload_folder(repo_id=name, folder_path=folder, token=token, commit_message=commit_message)
            except Exception as error:  # the client's own, or those of requests or httpx, by its version
                raise ValueError(
                    f"{repo_id} was not uploaded ({first_line(error)}): check the name and the network, and log in by "
                    "`hf auth login`"
                ) from error
        return str(done)
