"""Encoders in 8-bit integers for prediction on a CPU, through ONNX Runtime.

Weights are scaled by channel, activations as they come. The scale of the activations is taken from all that runs at
once, so a note would come out differently beside other notes. Each sequence therefore runs alone and unpadded, on one
thread: the result is the same in any batch and with any number of workers. On a CPU this costs nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from clinical_nlp.errors import ModelError

FILE = "model.onnx"
"""Name of the 8-bit network in a model folder."""
_NEEDED = "8-bit encoders need the extra `onnx`: pip install 'clinical-nlp[onnx]'"


def export_int8(network: Any, folder: Path) -> None:
    """Write an encoder to `folder` as `model.onnx` in 8-bit integers, with its config.

    Parameters
    ----------
    network : encoder of transformers with adapters merged; it is not changed.
    folder : is made where it is not there.

    Raises
    ------
    ModelError : the extra `onnx` is not installed, or the architecture cannot be exported.
    """
    import torch

    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        raise ModelError(_NEEDED) from None

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            states: torch.Tensor = self.network(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids)
            ).last_hidden_state
            return states

    folder.mkdir(parents=True, exist_ok=True)
    longest = int(getattr(network.config, "max_position_embeddings", 512))
    width = torch.export.Dim("width", min=2, max=longest)
    training = network.training
    with tempfile.TemporaryDirectory(dir=folder) as scratch, _quiet():
        plain = Path(scratch) / "plain.onnx"
        try:
            # A length that is no power of two, so that nothing is taken for a constant.
            program = torch.onnx.export(
                States().eval(),
                (torch.ones(1, min(37, longest), dtype=torch.long),),
                dynamo=True,
                dynamic_shapes=({1: width},),
                input_names=["input_ids"],
                output_names=["states"],
                verbose=False,
            )
            assert program is not None
            program.save(str(plain))
            quantize_dynamic(plain, folder / FILE, weight_type=QuantType.QInt8, per_channel=True)
        except OSError:  # a full disk is no fault of the encoder
            raise
        # The exporter has a class of its own for each thing that it cannot do.
        except Exception as error:
            raise ModelError(
                f"an encoder of type {network.config.model_type} cannot be written in 8-bit ({type(error).__name__})"
            ) from None
        finally:
            network.train(training)
    network.config.save_pretrained(folder)


def load_int8(folder: Path) -> Any:
    """Load what `export_int8` wrote: a module that is called like the encoder and gives `last_hidden_state`.

    Raises
    ------
    ModelError : the extra `onnx` is not installed, or the file is damaged.
    """
    import torch
    from transformers import AutoConfig

    try:
        import onnxruntime
    except ImportError:
        raise ModelError(_NEEDED) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
    # ONNX Runtime has no common class of errors.
    except Exception as error:
        raise ModelError(f"{folder / FILE} cannot be read ({type(error).__name__}); copy the run again") from None
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)

    class Int8Encoder(torch.nn.Module):
        config = settings
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            if torch.is_grad_enabled():
                raise ModelError("an 8-bit encoder only predicts; train the run that it was made from")
            states = torch.zeros(*input_ids.shape, settings.hidden_size)
            for row, length in enumerate(attention_mask.sum(1).tolist()):
                if length:
                    found = session.run(None, {"input_ids": input_ids[row : row + 1, :length].cpu().numpy()})[0]
                    states[row, :length] = torch.from_numpy(found[0])
            return SimpleNamespace(last_hidden_state=states)

    return Int8Encoder()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Withhold what the exporter reports of its own steps, on both streams and in the log."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        finally:
            logging.disable(level)
