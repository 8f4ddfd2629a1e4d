"""Connectors exported by the authors' training stages: `denoise_projector.bin`, `siglip_projector.bin`."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from uniworld.checkpoint.names import TOWER_PREFIX

EXPORTS = ("denoise_projector", "siglip_projector")


def read_connector(path: Path, part: str) -> dict[str, Tensor]:
    """The tensors `0.weight, 0.bias, 2.weight, 2.bias` of an export, whatever prefix its keys have.

    Raises:
        ValueError: not a torch file of plain tensors, or other keys in it.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # `torch.load` has as many ways to fail as there are broken files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: no torch file of plain tensors ({reason})") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path}: holds no tensors by name")
    return {key.rpartition(f"{part}.")[2]: value for key, value in weights.items()}


def read_connectors(folder: Path) -> dict[str, Tensor]:
    """The tensors of all exports that `folder` holds, under the keys of a whole checkpoint.

    Raises:
        FileNotFoundError: it holds none.
        ValueError: as `read_connector`.
    """
    return {
        f"{TOWER_PREFIX}{part}.{name}": tensor
        for part in _found(folder)
        for name, tensor in read_connector(folder / f"{part}.bin", part).items()
    }


def write_connector(folder: Path, part: str, tensors: dict[str, Tensor]) -> None:
    """An export, as `.bin` and as `.safetensors`, under the keys of a whole checkpoint.

    Args:
        tensors: `0.weight, 0.bias, 2.weight, 2.bias`.
    """
    named = {f"{TOWER_PREFIX}{part}.{name}": tensor for name, tensor in tensors.items()}
    torch.save(named, folder / f"{part}.bin")
    path = folder / f"{part}.safetensors"
    path.touch()
    mode = path.stat().st_mode  # what the umask gives; safetensors makes its files private
    save_file(named, path, metadata={"format": "pt"})
    path.chmod(mode)


def _found(folder: Path) -> list[str]:
    found = [part for part in EXPORTS if (folder / f"{part}.bin").is_file()]
    if not found:
        raise FileNotFoundError(f"connectors={folder}: holds neither {' nor '.join(f'{p}.bin' for p in EXPORTS)}")
    return found


def override_connectors(connectors: dict[str, nn.Module], folder: Path, check_finite: bool = False) -> None:
    """Put the exports that `folder` holds in place of the connectors' weights.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: keys or shapes do not fit, or a tensor holds NaN or infinity with `check_finite`.
    """
    for part in _found(folder):
        path = folder / f"{part}.bin"
        weights, parameters = read_connector(path, part), dict(connectors[part].named_parameters())
        if set(weights) != set(parameters):
            raise ValueError(f"{path}: holds {sorted(weights)}, must be {sorted(parameters)}")
        for name, parameter in parameters.items():
            if weights[name].shape != parameter.shape:
                shapes = f"{list(weights[name].shape)}, must be {list(parameter.shape)}"
                raise ValueError(f"{path}: shape of {name} is {shapes}")
            if not weights[name].is_floating_point():
                raise ValueError(f"{path}: dtype of {name} is {weights[name].dtype}, must be floating point")
            if check_finite and not torch.isfinite(weights[name]).all():
                raise ValueError(f"{path}: {name} holds NaN or infinite values")
        for name, parameter in parameters.items():
            parameter.data.copy_(weights[name])
