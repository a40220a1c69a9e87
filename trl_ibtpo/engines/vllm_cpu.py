"""What is different where vLLM runs on a CPU."""

from trl.generation.vllm_generation import VLLMGeneration


class CPUVLLMGeneration(VLLMGeneration):
    """TRL's vLLM backend where vLLM runs on a CPU, which differs in how weights get in.

    vLLM's CPU build repacks Linear weights when it loads them, and TRL's parameter-wise `load_weights` cannot write to
    packed ones. This takes vLLM's own `reload_weights` instead, then packs a tied LM head again: it has a packed copy
    of the embeddings, which reloading does not touch.

    It also cannot take back a seeded sample after one part of a prompt ("CPU Generator does not use offset"), so
    prompts are not computed in parts there.
    """

    @classmethod
    def adopt(cls, generation: VLLMGeneration) -> "CPUVLLMGeneration":
        """Take over an engine that TRL has started."""
        adopted = cls.__new__(cls)
        adopted.__dict__ = generation.__dict__
        adopted.llm.llm_engine.vllm_config.scheduler_config.enable_chunked_prefill = False
        return adopted

    def sync_weights(self) -> None:
        # Cloned, since a LoRA merge is undone and the optimizer writes in place while vLLM may still hold the tensor.
        weights = ((name, parameter.clone()) for name, parameter in self._iter_named_params())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        lm_head = getattr(model, "lm_head", None)
        if lm_head is not None and getattr(model.config, "tie_word_embeddings", False):
            lm_head.quant_method.process_weights_after_loading(lm_head)
        self.llm.reset_prefix_cache()


def runs_on_cpu() -> bool:
    """Whether the installed vLLM is a CPU build."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()
