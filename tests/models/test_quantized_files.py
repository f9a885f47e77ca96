"""FP8 releases and MXFP4 experts are read as what they stand for, expert by expert and dense."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from raymoe.models import CheckpointWriter, load_without_experts
from raymoe.models.weight_files import dequantize_fp8, dequantize_mxfp4
from tests.tiny_models import tiny_model

BLOCK = [24, 20]  # neither divides the tiny model's sizes, so blocks at the edges are cut
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK}


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scales, what they stand for), block by block."""
    rows, columns = weight.shape
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    meant = torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1])
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = codes[part].float() * scales[i, j]
    return codes, scales, meant


def set_config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def fp8_folder(tmp_path):
    """(directory, {name in the files: the weight that is meant})"""
    folder = tmp_path / "fp8"
    tiny_model("deepseek_v3", dtype=torch.bfloat16).save_pretrained(folder)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in list(tensors):
        if name.endswith("proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"], meant[name] = quantized(tensors[name].float())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, quantization_config=FP8)
    return folder, meant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fp8_is_read_as_what_it_means(fp8_folder, dtype):
    folder, meant = fp8_folder
    model, files = load_without_experts(folder, dtype)
    dense = {name: tensor for name, tensor in model.state_dict().items() if name in meant}
    assert "model.layers.0.mlp.down_proj.weight" in dense
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in dense
    for name, tensor in dense.items():
        assert torch.equal(tensor, meant[name].to(dtype)), name
    flat = torch.empty(files.layers[0].layout.numel, dtype=dtype)
    for expert in range(8):
        read_bytes = files.read(0, expert, flat)
        views = files.layers[0].layout.views(flat[None])
        gate, up, down = (meant[f"model.layers.1.mlp.experts.{expert}.{n}_proj.weight"] for n in ("gate", "up", "down"))
        assert torch.equal(views["gate_up_proj"][0], torch.cat([gate, up]).to(dtype))
        assert torch.equal(views["down_proj"][0], down.to(dtype))
        # one byte a weight, and four a scale: 1 x 2 blocks of 24 x 20 in [16, 32], 2 x 1 in [32, 16]
        assert read_bytes == 3 * 16 * 32 + 4 * (2 + 2 + 2)


def test_fp8_is_written_plain(fp8_folder, tmp_path):
    folder, meant = fp8_folder
    model, files = load_without_experts(folder, None)
    assert files.dtype == torch.bfloat16
    with CheckpointWriter(tmp_path / "out", model, dtype=files.stored_dtypes) as writer:
        writer.add({name: t for name, t in model.state_dict().items() if ".experts." not in name})
        for expert in range(8):
            flat = torch.empty(files.layers[0].layout.numel, dtype=files.dtype)
            files.read(0, expert, flat)
            writer.add_experts(files.layers[0], {expert: flat})
    written = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")
    written |= load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")
    assert meant.keys() <= written.keys()
    assert not any(name.endswith("_scale_inv") for name in written)
    assert all(torch.equal(written[name], weight.bfloat16()) for name, weight in meant.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_fp8_that_does_not_fit_is_named(fp8_folder):
    folder, _ = fp8_folder
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    scales = tensors.pop(f"{name}_scale_inv")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"experts\.3\.up_proj\.weight' is FP8, and its scales .*_scale_inv' are not"):
        load_without_experts(folder, None)
    save_file(tensors | {f"{name}_scale_inv": scales.repeat(2, 1)}, file)
    with pytest.raises(
        ValueError, match=r"has shape \[2, 2\]; blocks of \[24, 20\] in a weight of \[16, 32\] need \[1, 2\]"
    ):
        load_without_experts(folder, None)
    set_config(folder, quantization_config=FP8 | {"weight_block_size": None})
    with pytest.raises(ValueError, match="weight_block_size: got None"):
        load_without_experts(folder, None)
    set_config(folder, quantization_config=None)
    with pytest.raises(ValueError, match=r"is FP8, but config\.json has no quantization_config"):
        load_without_experts(folder, None)


def test_fp8_blocks_by_hand():
    codes = torch.arange(-9, 6).view(3, 5).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    expected = [[float(codes[i, j]) * float(scales[i // 2, j // 2]) for j in range(5)] for i in range(3)]
    assert dequantize_fp8(codes, scales, (2, 2)).tolist() == expected


def test_mxfp4_is_transformers_own():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (3, 10, 2), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(codes, scales, dtype=torch.float32)
    assert torch.equal(dequantize_mxfp4(codes, scales), expected)


def test_mxfp4_experts_of_a_release(tmp_path):
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, meant = load_file(file), {}
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, in_size, out_size = tensors.pop(name).shape
        codes = torch.randint(
            0, 256, (num_experts, out_size, in_size // 32, 16), dtype=torch.uint8, generator=generator
        )
        scales = torch.randint(118, 128, codes.shape[:-1], dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        meant[name] = convert_moe_packed_tensors(codes, scales, dtype=torch.bfloat16)
    assert len(meant) == 4
    save_file(tensors, file)
    set_config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})

    _, files = load_without_experts(tmp_path, None)
    for layer in files.layers:
        flat = torch.empty(layer.num_experts, layer.layout.numel, dtype=torch.bfloat16)
        for expert in range(layer.num_experts):
            files.read(layer.index, expert, flat[expert])
        for field, view in layer.layout.views(flat).items():
            name = f"{layer.name}.{field}"
            assert torch.equal(view, meant.get(name, tensors.get(name)))

    lost = next(name for name in tensors if name.endswith("_scales"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file)
    with pytest.raises(ValueError, match=f"its scales '{lost}' are not in the files"):
        load_without_experts(tmp_path, None)
