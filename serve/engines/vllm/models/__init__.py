"""What vLLM is told of our architectures, in each of its processes: the entry point of `vllm.general_plugins`."""

from __future__ import annotations

MODELS = {
    "UlmForCausalLM": "serve.engines.vllm.models.decoder:UlmForCausalLM",
    "UlmMixtureForCausalLM": "serve.engines.vllm.models.composite:UlmMixtureForCausalLM",
}


def register() -> None:
    """Names our architectures and their configurations; vLLM imports a model's module when it is asked for one.

    It may be called again and again, and touches no device: workers are forked after it.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from serve.engines.vllm.models.configuration import UlmMixtureConfig
    from ulm.exchange.carried.configuration_ulm import UlmConfig

    for config in (UlmConfig, UlmMixtureConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    known = ModelRegistry.get_supported_archs()
    for name, place in MODELS.items():
        if name not in known:
            ModelRegistry.register_model(name, place)
