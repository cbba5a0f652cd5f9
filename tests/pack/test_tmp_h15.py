import torch
from tests.test_several_packs import *
from alphaedit_peft import delta_algebra, EditPack
def test_x(tokenizer, tmp_path):
    for below, above in ((PARENTS, CHILDREN), ([BORN], [WORK])):
        model = on_top(tokenizer, below, above)
        model.save_pretrained(tmp_path/"a", selected_adapters=["default"]); model.save_pretrained(tmp_path/"b", selected_adapters=["b"])
        a,b = (EditPack.from_pretrained(tmp_path/n) for n in "ab")
        print([(r.edit.id, r.row, r.role) for r in b.records], b.parents, a.digest())
        j = EditPack.join([a,b], norm_guard=0)
        print([(r.edit.id, r.row, r.role, r.batch) for r in j.records], [p["operation"] for p in j.parents])
        for m in j.modules:
            A = torch.cat([a.factors[m].A, b.factors[m].A])
            want = sum(delta_algebra.outputs(p.factors[m], A) for p in (a,b))
            got = delta_algebra.outputs(j.factors[m], A)
            print(m, float((got-want).norm()/want.norm()), ((got-want).norm(dim=1)/want.norm(dim=1)).tolist())
    assert 0
