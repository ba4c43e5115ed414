"""What single families of the zoo do otherwise: masks of both directions, sparse layers, image paths."""

from __future__ import annotations

import pytest
import torch

from tests.models import test_zoo, tiny
from tests.models.zoo import _common, kimi_k25, llava_next, minimax_m3_vl, molmo2, qwen3_vl_moe, smolvlm, video_llama_3
from vidtok.models import attach

pytestmark = pytest.mark.skipif(tiny.VERSION < (5, 23), reason="families of transformers 5.23")
far, logits = test_zoo.far, test_zoo.logits


class TestMolmo2:
    """Visual tokens see each other both ways, also those that are left of a reduction."""

    @staticmethod
    def by_hand(model, inputs, both):
        """Logits of the reduced row: the kept tokens at their own positions, under a mask made here."""
        seen = {}

        def keep(module, args, kwargs):
            seen.update(kwargs)

        hook = model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
        logits(model, inputs)
        hook.remove()
        embeds = seen["inputs_embeds"]
        visual = inputs["input_ids"][0] == _common.IMAGE
        at = torch.nonzero(visual).squeeze(1)
        plan = tiny.drop(embeds[0, at], inputs["video_grids"])
        kept = torch.cat([torch.nonzero(~visual).squeeze(1), at[plan.anchor.long()]]).sort().values
        mask = torch.ones(len(kept), len(kept)).tril().bool()
        if both:
            typed = inputs["mm_token_type_ids"][0, kept] == 1
            mask |= typed[:, None] & typed
        out = model.model.language_model(
            inputs_embeds=embeds[:, kept], attention_mask=mask[None, None], position_ids=kept[None], use_cache=False
        )
        return model.lm_head(out.last_hidden_state)

    def test_by_hand(self):
        model, samples = molmo2.make(), [[("video", 3, 56), ("video", 2, 56)]]
        inputs = molmo2.batch(samples)
        with torch.no_grad():
            want, causal = self.by_hand(model, inputs, True), self.by_hand(model, inputs, False)
        with attach(model, visual=tiny.drop):
            got = logits(model, inputs)
        assert far(got, want) < 2e-5 * got.abs().max()
        assert far(got, causal) > 1e-3 * got.abs().max()

    def test_inside(self):
        model, seen = molmo2.make(), {}
        inputs = molmo2.batch([[("video", 3, 56), ("video", 2, 56)]])
        layer, decoder = model.model.language_model.layers[1], model.model.language_model

        def record(which):
            def hook(module, args, kwargs):
                seen[which] = (args[0], kwargs)

            return layer.register_forward_pre_hook(hook, with_kwargs=True)

        with record("whole"):
            logits(model, inputs)
        with attach(model, decoder="uni_1_0.5"), record("left"):
            got = logits(model, inputs)
        (whole, given), (left, _) = seen["whole"], seen["left"]
        kept = torch.tensor([int((whole[0] - x).abs().amax(-1).argmin()) for x in left[0]])
        assert torch.equal(whole[:, kept], left) and left.shape[1] < whole.shape[1]
        mask = given["attention_mask"][:, :, kept][..., kept]
        position = tuple(x[:, kept] for x in given["position_embeddings"])
        with torch.no_grad():
            for seeing, near in ((mask, True), (torch.ones_like(mask).tril(), False)):
                out = layer(left, attention_mask=seeing, position_embeddings=position)
                want = model.lm_head(decoder.norm(out))
                assert (far(got, want) < 2e-5 * got.abs().max()) == near


class TestMiniMaxSparse:
    """Layers whose index counts columns."""

    def make(self):
        return minimax_m3_vl.make(
            layer_types=["full_attention", "minimax_m3_sparse"], index_n_heads=2, index_head_dim=16,
            index_block_size=8, index_topk_blocks=2,
        )  # fmt: skip

    def test_one_row(self):
        model = self.make()
        inputs = minimax_m3_vl.batch([[("video", 8, 112), ("video", 4, 56)]])
        with attach(model, visual=tiny.drop):
            got, out = tiny.generate(model, inputs, 4)
            assert far(got, test_zoo.uncached(model, inputs, out.sequences[:, -4:])) < 2e-5 * got.abs().max()

    def test_padding(self):
        model, inputs = self.make(), minimax_m3_vl.batch(minimax_m3_vl.ROWS)
        with attach(model, visual=tiny.drop), pytest.raises(ValueError, match="expected rows of one length"):
            model(**inputs)

    def test_inside(self):
        with pytest.raises(ValueError, match="expected a known kind of layer"):
            attach(self.make(), decoder="uni_1_0.5")


class TestKimi:
    """Frames of a chunk are averaged, and upstream's own split of the features does not know it."""

    def test_long_chunk(self):
        with pytest.raises(RuntimeError, match="split_sizes"):
            kimi_k25.make()(**kimi_k25.batch([[("video", 4, 56)]]))


class TestVideoLlama3:
    """A mask of tokens that the processor left out."""

    def test_compressed(self):
        model, samples = video_llama_3.make(), [[("video", 3, 56), ("video", 2, 56)]]
        inputs = video_llama_3.batch(samples)
        at = torch.nonzero(inputs["input_ids"][0] == _common.VIDEO).squeeze(1)
        kept = torch.ones(len(at), dtype=torch.bool)
        kept[[5, 7, 10]] = False
        left = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
        left[at[~kept]] = False
        inputs |= {k: inputs[k][:, left] for k in ("input_ids", "attention_mask")}
        inputs["video_compression_mask"] = kept
        with attach(model, visual=tiny.drop) as handle:
            got, out = tiny.generate(model, inputs, 3)
            assert [s.grid_thw for s in handle.report().samples] == [(1, 1, 9), (2, 2, 2)]
            assert far(got, test_zoo.uncached(model, inputs, out.sequences[:, -3:])) < 2e-5 * got.abs().max()


class TestLlavaNext:
    """The newlines between the tiles of a frame, from its size or from features made before."""

    def test_newlines(self):
        model = llava_next.make()
        model.config.image_grid_pinpoints = [[56, 56], [112, 56]]
        sizes = torch.tensor([[100, 40]] * 2)
        pixels = torch.stack([_common.clip(0, j, 3, 56) for j in range(2)])
        features = model.model.get_image_features(pixels, sizes).pooler_output
        newline = (torch.cat(list(features)) == model.model.image_newline).all(-1)
        per = len(features[0])
        g = torch.Generator().manual_seed(0)
        frame = [_common.START, *[_common.IMAGE] * per, _common.END]
        ids = torch.tensor([[*_common.words(3, g), *frame, *_common.words(2, g), *frame, *_common.words(4, g)]])
        inputs = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": sizes,
        }  # fmt: skip
        with attach(model, visual=tiny.drop) as handle:
            got, out = tiny.generate(model, inputs, 3)
            (sample,) = handle.report().samples
            assert sample.tokens_in == 2 * per - int(newline.sum()) and sample.grid_thw[0] == 2
            assert far(got, test_zoo.uncached(model, inputs, out.sequences[:, -3:])) < 2e-5 * got.abs().max()
            assert handle.report().samples[0].tokens_in == sample.tokens_in


class TestSmolVLM:
    """Frames behind their times, of which only the last digits lie near them."""

    def test_minutes(self):
        model = smolvlm.make()
        ids, pixels = [3], []
        for second in (0, 31, 60, 91):
            time = [20 + int(d) for d in f"{second // 60:02d}{second % 60:02d}"]
            ids += [*time, 9, 8, 7, _common.START, *[_common.IMAGE] * 4, _common.END]
            pixels.append(_common.clip(0, second // 10, 1, 56))
        ids = torch.tensor([[*ids, 11, 12]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.cat(pixels)[None]}
        with attach(model, visual=tiny.drop) as handle:
            logits(model, inputs)
            assert [s.grid_thw for s in handle.report().samples] == [(4, 2, 2)]


class TestRouters:
    """The loss that balances experts masks tokens by the mask of the whole rows."""

    @pytest.mark.parametrize(("visual", "decoder"), [("uniform:ratio=0.5", None), (None, "uni_3_0.5")])
    def test_its_mask_is_refused(self, visual, decoder):
        model = qwen3_vl_moe.make(layers=4)
        inputs = qwen3_vl_moe.batch(qwen3_vl_moe.ROWS)
        one = qwen3_vl_moe.row(inputs, qwen3_vl_moe.ROWS, 0)
        bare = {name: value for name, value in one.items() if name != "attention_mask"}
        with attach(model, visual=visual, decoder=decoder), torch.no_grad():
            with pytest.raises(ValueError, match="expected output_router_logits=False or no attention_mask"):
                model(**inputs, output_router_logits=True)
            out = model(**bare, output_router_logits=True, use_cache=False)
            torch.testing.assert_close(out.logits, logits(model, one))
            assert torch.isfinite(out.aux_loss)
