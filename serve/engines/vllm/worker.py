"""What vLLM's workers do for us beside their own: new weights in place. A worker inherits this class."""

from __future__ import annotations

from typing import Any


class Reloading:
    """`worker_extension_cls` of the engine; its methods are called through collective_rpc."""

    model_runner: Any
    reload_weights: Any

    def ulm_reload(self, folder: str) -> None:
        """The weights of an exported folder of the same shape, in place of those that are loaded."""
        self.reload_weights(weights_path=folder)
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.platforms import current_platform

        # A tied head gets no tensor of its own, so vLLM 0.29 leaves the packed copy that the CPU multiplies with as it
        # was, and goes on answering by the old one. It can go when the test of reload passes without.
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
            # Nor does it pack a mixture's experts again for the CPU, whose kernel would take the rows for packed ones.
            if isinstance(module, RoutedExperts) and current_platform.is_cpu():
                module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)
