"""[P ; E[ids]]: stand-in until the op lands."""

import torch


def prompt_embedding(input_ids, embedding, prompt):
    e = embedding(input_ids)
    return torch.cat((prompt.to(e.dtype).expand(e.shape[0], -1, -1), e), 1)


def extend_inputs(prompt_length, *, attention_mask=None, position_ids=None, labels=None, token_type_ids=None):
    out = {}

    def front(t, value):
        return torch.cat((t.new_full((t.shape[0], prompt_length), value), t), 1)

    if attention_mask is not None:
        out["attention_mask"] = front(attention_mask, 1)
    if labels is not None:
        out["labels"] = front(labels, -100)
    if token_type_ids is not None:
        out["token_type_ids"] = front(token_type_ids, 0)
    if position_ids is not None:
        out["position_ids"] = torch.cat(
            (torch.arange(prompt_length).expand(position_ids.shape[0], -1), position_ids + prompt_length), 1
        )
    return out
