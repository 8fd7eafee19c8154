"""Fields that clients of OpenAI's image routes and of its kin send, and that are not served."""

# These never change a picture, and are sent for the operator's sake.
SILENT = {"safety_identifier"}
# The values that ask for nothing in the fields below.
ASKS_NOTHING = {"", "0", "auto", "false"}
NO_EFFECT = {
    "bot_task",
    "complexity",
    "diffusers_kwargs",
    "enable_teacache",
    "enable_upscaling",
    "enhance_prompt",
    "extra_params",
    "flow_shift",
    "frame_count",
    "frame_duration_ms",
    "generator_device",
    "input_fidelity",
    "layers",
    "lora",
    "max_sequence_length",
    "moderation",
    "perf_dump_path",
    "profile",
    "return_stage_metrics",
    "strength",
    "style",
    "svg",
    "system_prompt",
    "task_type",
    "true_cfg_scale",
    "upscaling_model_path",
    "upscaling_scale",
    "vae_use_slicing",
    "vae_use_tiling",
}
