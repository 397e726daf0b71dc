"""Names of the layers with LoRA in files of other programs, as those programs list them.

Written down from the models as first published, independently of the package.
"""

CLIP = (
    "self_attn_q_proj",
    "self_attn_k_proj",
    "self_attn_v_proj",
    "self_attn_out_proj",
    "mlp_fc1",
    "mlp_fc2",
)
ATTENTION = tuple(
    f"{attention}_{layer}"
    for attention in ("attn1", "attn2")
    for layer in ("to_q", "to_k", "to_v", "to_out_0")
)
SD15_ATTENTIONS = {  # name -> number of transformer blocks
    "down_blocks_0_attentions_0": 1,
    "down_blocks_0_attentions_1": 1,
    "down_blocks_1_attentions_0": 1,
    "down_blocks_1_attentions_1": 1,
    "down_blocks_2_attentions_0": 1,
    "down_blocks_2_attentions_1": 1,
    "mid_block_attentions_0": 1,
    "up_blocks_1_attentions_0": 1,
    "up_blocks_1_attentions_1": 1,
    "up_blocks_1_attentions_2": 1,
    "up_blocks_2_attentions_0": 1,
    "up_blocks_2_attentions_1": 1,
    "up_blocks_2_attentions_2": 1,
    "up_blocks_3_attentions_0": 1,
    "up_blocks_3_attentions_1": 1,
    "up_blocks_3_attentions_2": 1,
}
SDXL_ATTENTIONS = {
    "input_blocks_4_1": 2,
    "input_blocks_5_1": 2,
    "input_blocks_7_1": 10,
    "input_blocks_8_1": 10,
    "middle_block_1": 10,
    "output_blocks_0_1": 10,
    "output_blocks_1_1": 10,
    "output_blocks_2_1": 10,
    "output_blocks_3_1": 2,
    "output_blocks_4_1": 2,
    "output_blocks_5_1": 2,
}


def clip(prefix: str, layers: int) -> set[str]:
    return {
        f"{prefix}_text_model_encoder_layers_{i}_{layer}" for i in range(layers) for layer in CLIP
    }


def unet(attentions: dict[str, int]) -> set[str]:
    return {
        f"lora_unet_{name}_transformer_blocks_{i}_{layer}"
        for name, blocks in attentions.items()
        for i in range(blocks)
        for layer in ATTENTION
    }


SD15 = clip("lora_te", 12) | unet(SD15_ATTENTIONS)  # 72 + 128
# SDXL reads the first text encoder before its twelfth layer, which adapters leave out
SDXL = clip("lora_te1", 11) | clip("lora_te2", 32) | unet(SDXL_ATTENTIONS)  # 66 + 192 + 560
