"""What ``lean.py`` times: ways from noise, or from a class, to tokens or images, of one preset with random weights.

A contestant is named ``WAY[_STEPS][_bf16|_fp16][_compile|_graph]``:

- ``reference``: as the released code does it: every position compared with the whole codebook, in differences, the
  noise/data layers applied at every position, a dense bias, logits for all positions, both steps in full;
- ``plain``: the oracle of the tests, ``ddops.sampling.plain`` (the same without the comparison and with folded layers);
- ``lean``: what users run;
- ``teacher``: KV-cached, adaptive norms once, both halves of guidance in one batch;
- ``involved``: teacher-involved sampling, levels as in the paper's table;
- ``onnx``, ``tensorrt``: the exported lean graph in ONNX Runtime, and in a TensorRT engine built here for this GPU and
  batch (images only). These two take fp16, the others bf16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from untrained import with_weights

from ddops.config.stages import EngineConfig, GraphPrecision, ProfileConfig
from ddops.export.bundle import Sources, write_bundle
from ddops.export.engines import build_engines
from ddops.export.manifest import MANIFEST, read_manifest
from ddops.export.tensorrt import CURRENT, installed_flavour
from ddops.inference.backends import load_backend
from ddops.models.interface import Student, Teacher
from ddops.models.lean import make_lean
from ddops.models.reduced import to_bfloat16
from ddops.models.registry import build_student, build_teacher
from ddops.models.var_student import VARStudent
from ddops.models.weights import STUDENT, TOKENIZER, save_weights
from ddops.sampling.few_step import sample_student
from ddops.sampling.mixed import sample_teacher_involved
from ddops.sampling.noise import Stream, normals, uniforms
from ddops.sampling.plain import plain_sample
from ddops.sampling.teacher import categorical_picker, sample_teacher

INVOLVED: Final = {"var": (3, 5), "llamagen": (40, 80)}
"""Levels that the teacher draws, counted from 0, in one row of the paper's table for each family."""
TEACHER_HEADS: Final = ("transformer.norm", "transformer.head", "transformer.head_norm")
Run = Callable[[], Any]


class ReleasedVARStudent(VARStudent):
    """The noise/data layers at every position, as in the released code."""

    def _noise_data_term(self, layer: nn.Module, is_data_BP: Tensor) -> Tensor:
        return layer(self.noise_data_embedding(is_data_BP))  # type: ignore[no-any-return]


def nearest_by_differences(x_BLC: Tensor, codebook_VC: Tensor) -> Tensor:
    """As the released code finds codes: 2 V B L C numbers are held."""
    return (x_BLC[:, :, None] - codebook_VC).square().sum(-1).argmin(-1)


@dataclass(frozen=True)
class Contest:
    """Models and inputs of one preset and batch size, on one device."""

    config: Any
    batch: int
    device: str
    images: bool
    """To images, else to tokens and embeddings."""
    work: Path
    """Where exported graphs are kept from one run to the next."""
    source: str
    """Git's hash of the code that is timed: graphs of other code are not used."""

    def build(self, name: str) -> Run:
        """The contestant of that name, ready to run; raises ValueError for a name that is none."""
        way, *options = name.split("_")
        steps = int(options.pop(0)) if options and options[0].isdigit() else 1
        exported = way in ("onnx", "tensorrt")
        if unknown := {*options} - ({"fp16"} if exported else {"bf16", "compile", "graph"}):
            raise ValueError(f"{name}: unknown {', '.join(sorted(unknown))}")
        if exported:
            return self._exported(way, steps, "float16" if options else "float32")
        half = "bf16" in options
        draw = {
            "reference": self._reference,
            "plain": self._plain,
            "lean": self._lean,
            "teacher": self._teacher,
            "involved": self._involved,
        }[way](steps, half)
        if "compile" in options:
            draw = torch.compile(draw)
        return self._captured(draw, half) if "graph" in options else self._plainly(draw, half)

    # the ways

    def _reference(self, steps: int, half: bool) -> Run:
        student, decode = self._student(half), self._decode(half, lean=False)

        def draw() -> Tensor:
            x_BLC = self.noise_BLC
            for _ in range(steps):
                nearest_by_differences(x_BLC, self.codebook_VC)
            q_BLC = plain_sample(student, self.codebook_VC, x_BLC, self.labels_B, self._starts(steps), self._prefix)
            return decode(q_BLC)

        return draw

    def _plain(self, steps: int, half: bool) -> Run:
        student, decode = copy.copy(self._student(half)), self._decode(half, lean=False)
        if isinstance(student, ReleasedVARStudent):
            student.__class__ = VARStudent
        arguments = self.codebook_VC, self.noise_BLC, self.labels_B, self._starts(steps), self._prefix
        return lambda: decode(plain_sample(student, *arguments))

    def _lean(self, steps: int, half: bool) -> Run:
        student, decode = self._student(half), self._decode(half, lean=True)
        arguments = self.codebook_VC, self.noise_BLC, self.labels_B, self._starts(steps), self._prefix
        return lambda: decode(sample_student(student, *arguments))

    def _teacher(self, steps: int, half: bool) -> Run:
        teacher, decode = self._teacher_of(half), self._decode(half, lean=True)

        def draw() -> Tensor:
            ids_BL = sample_teacher(teacher, self.labels_B, self.config.sampling, self._pick)
            return decode(F.embedding(ids_BL, self.codebook_VC))

        return draw

    def _involved(self, steps: int, half: bool) -> Run:
        teacher, student, decode = self._teacher_of(half), self._student(half), self._decode(half, lean=True)
        levels = INVOLVED[self.config.teacher.model.family]
        arguments = self.noise_BLC, self.labels_B, levels, self._prefix, self.config.sampling, self._pick
        return lambda: decode(sample_teacher_involved(student, teacher, *arguments))

    def _exported(self, way: str, steps: int, precision: GraphPrecision) -> Run:
        if not self.images:
            raise ValueError("the exported graph draws images; time it beside those")
        bundle = self._bundle(steps, precision)
        if way == "tensorrt":
            profile = ProfileConfig(min=1, opt=self.batch, max=self.batch)
            engine = EngineConfig(flavour=installed_flavour(()), targets=(CURRENT,), profile=profile)
            build_engines(bundle, bundle, engine, None, lambda phase, done, total: None)
        backend = load_backend(bundle, read_manifest(bundle), way, device=self.device, threads=torch.get_num_threads())
        noise_BLC, labels_B = self.noise_BLC.cpu().numpy(), self.labels_B.cpu().numpy()
        return lambda: backend.draw(noise_BLC, labels_B)

    def _bundle(self, steps: int, precision: GraphPrecision) -> Path:
        """The student and the decoder, exported. Two images are compared with PyTorch's, loosely in half precision."""
        directory = self.work / self.source[:12] / f"{self.config.preset}-{steps}-{precision}"
        if (directory / MANIFEST).exists():
            return directory
        directory.mkdir(parents=True, exist_ok=True)
        model, files = self.config.teacher.model, {STUDENT: self.student, TOKENIZER: self.teacher.tokenizer}
        for name, module in files.items():
            save_weights(directory / f"{name}.safetensors", module.state_dict(), model, name)
        half = precision != "float32"
        bounds = (None, 20.0, 0.5) if half else (1e-4, 60.0, 1.0)
        settings = replace(
            self.config.export,
            **{"precision": precision, "steps": steps, "parity_count": 2},
            **dict(zip(("tolerance", "min_psnr", "min_equal_tokens"), bounds, strict=True)),
        )
        weights = (directory / f"{name}.safetensors" for name in files)
        write_bundle(directory, Sources(*weights, self.config.dd1.start_positions, self._prefix), settings, {})
        return directory

    # how they run

    def _plainly(self, draw: Run, half: bool) -> Run:
        def run() -> Any:
            with torch.inference_mode(), self._autocast(half):
                return draw()

        return run

    def _captured(self, draw: Run, half: bool) -> Run:
        """As a CUDA graph: the kernels are launched by the device, all at once."""
        with torch.no_grad(), self._autocast(half):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    draw()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = draw()

        def run() -> Any:
            graph.replay()
            return result

        return run

    def _autocast(self, half: bool) -> Any:
        # Rounded weights are not copied, so that there is nothing to be cached; and a captured graph must not.
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=False) if half else nullcontext()

    # models and inputs

    @property
    def _prefix(self) -> int:
        prefix: int = self.config.dd1.logit_prefix
        return prefix

    def _starts(self, steps: int) -> tuple[int, ...]:
        starts: tuple[int, ...] = self.config.dd1.start_positions[:steps]
        return starts

    @cached_property
    def teacher(self) -> Teacher:
        torch.manual_seed(0)
        with torch.device(self.device):
            return with_weights(build_teacher(self.config.teacher.model))  # type: ignore[return-value]

    @cached_property
    def student(self) -> Student:
        model = self.config.teacher.model
        torch.manual_seed(1)
        with torch.device(self.device):
            student = ReleasedVARStudent(model) if model.family == "var" else build_student(model)
            return with_weights(student)  # type: ignore[return-value]

    @cached_property
    def _half_student(self) -> Student:
        return to_bfloat16(copy.deepcopy(self.student), self.student.head_modules)

    @cached_property
    def _half_teacher(self) -> Teacher:
        names = {name for name, _ in self.teacher.named_modules()}
        return to_bfloat16(copy.deepcopy(self.teacher), [name for name in TEACHER_HEADS if name in names])

    def _student(self, half: bool) -> Student:
        return self._half_student if half else self.student

    def _teacher_of(self, half: bool) -> Teacher:
        return self._half_teacher if half else self.teacher

    def _tokenizer(self, half: bool, lean: bool) -> Any:
        tokenizer = copy.deepcopy(self.teacher.tokenizer)
        if lean:
            tokenizer = make_lean(tokenizer)
        return to_bfloat16(tokenizer, ("decoder.norm_out", "decoder.conv_out")) if half else tokenizer

    def _decode(self, half: bool, *, lean: bool) -> Callable[[Tensor], Tensor]:
        if not self.images:
            return lambda q_BLC: q_BLC
        tokenizer = self._tokenizer(half, lean)
        return lambda q_BLC: tokenizer.decode(q_BLC).clamp(-1, 1)

    @cached_property
    def codebook_VC(self) -> Tensor:
        return self.teacher.codebook_VC.detach().clone()

    def _noise(self, batch: int) -> Tensor:
        shape = self.student.layout.length, self.codebook_VC.shape[1]
        return normals(0, Stream.SAMPLE_NOISE, np.arange(batch), shape).to(self.device)

    @cached_property
    def noise_BLC(self) -> Tensor:
        return self._noise(self.batch)

    @cached_property
    def labels_B(self) -> Tensor:
        return torch.arange(self.batch, device=self.device) % self.student.num_conditions

    @cached_property
    def _pick(self) -> Any:
        layout = self.student.layout
        uniforms_BL = torch.from_numpy(uniforms(0, Stream.CATEGORICAL, np.arange(self.batch), layout.length))
        return categorical_picker(layout, uniforms_BL.to(self.device))
