import torch

from raymoe.models import ExpertLayout, moe_layers, weights_of
from tests.tiny_models import FAMILIES, tiny_model


def test_views_share_memory_and_round_trip():
    for family in FAMILIES:
        for layer in moe_layers(tiny_model(family)):
            parameters = dict(layer.experts.named_parameters(recurse=False))
            flat = torch.full((layer.num_experts, layer.layout.numel), torch.nan)
            layer.layout.pack(parameters, flat)
            views = layer.layout.views(flat)
            assert all(torch.equal(views[name], value) for name, value in parameters.items())
            assert all(
                view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for view in views.values()
            )
            assert not flat.isnan().any()


def test_fields_start_where_grouped_gemms_may_read():
    for family in FAMILIES:
        layout = ExpertLayout.of(moe_layers(tiny_model(family))[0].experts)
        assert all(field.offset % 16 == 0 for field in layout.fields)
        assert layout.numel % 16 == 0


def test_weights_of_gives_biases_only_where_the_family_has_them():
    for family in FAMILIES:
        layer = moe_layers(tiny_model(family))[0]
        gate_up, down, biases = weights_of(layer, dict(layer.experts.named_parameters()))
        assert gate_up.shape[0] == down.shape[0] == layer.num_experts
        assert (biases is not None) == (family == "gpt_oss")
