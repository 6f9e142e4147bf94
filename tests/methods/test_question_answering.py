"""Question answering: its head is trained along, and its answers move behind a prompt."""

import families
import pytest
import torch
import transformers
from method_cases import shake

import peft_engine as pe
from peft_engine.methods.attach import tensors

IDS = families.inputs("bert")["input_ids"]


def model():
    torch.manual_seed(0)
    return transformers.BertForQuestionAnswering(transformers.BertConfig(**families.BERT)).eval()


@pytest.mark.parametrize("targets", (["query"], "all-linear"))
def test_the_head_is_trained_whole(targets):
    ours = pe.attach(model(), pe.LoraConfig(r=2, target_modules=targets, task_type="QUESTION_ANS"))
    whole = {path for path in tensors(ours, "default") if "lora_" not in path}
    assert whole == {"qa_outputs.weight", "qa_outputs.bias"}


@pytest.mark.peers
def test_peft_reads_it_and_we_read_pefts(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (the `peers` extra)")
    ours = shake(pe.attach(model(), pe.LoraConfig(r=2, target_modules=["query"], task_type="QUESTION_ANS")))
    theirs = peft.PeftModel.from_pretrained(model(), pe.save_adapter(ours, tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(IDS).start_logits, ours(IDS).start_logits)
    theirs.save_pretrained(tmp_path / "theirs")
    again = model()
    pe.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(IDS).end_logits, ours(IDS).end_logits)


def test_answers_move_behind_a_prompt():
    count = 5
    ours = shake(pe.attach(model(), pe.PromptTuningConfig(num_virtual_tokens=count)))
    start, end = torch.tensor([1, 2, 0, 99]), torch.tensor([3, 2, 1, 99])  # 99: no answer in this window
    out = ours(IDS, start_positions=start, end_positions=end)
    wanted = []
    for logits, at in ((out.start_logits, start), (out.end_logits, end)):
        none = logits.shape[1]
        moved = (at + count).clamp(max=none)
        wanted.append(torch.nn.functional.cross_entropy(logits, moved, ignore_index=none))
    torch.testing.assert_close(out.loss, sum(wanted) / 2)
