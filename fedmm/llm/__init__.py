"""The frozen LLM and the link to it: `llm(embeds, mask_BT, keep_BA) -> logits_BAV`, in this process or across gRPC."""
