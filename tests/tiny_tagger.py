"""A tagger of the real form that knows a handful of tags; python tests/tiny_tagger.py FOLDER writes one."""

import csv
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# The probability of each tag is sigmoid(weights · (red, green, blue) + bias) of the mean colour, from 0 to 1.
TAGS = [
    ("general", 9, (0, 0, 0), 6),
    ("red_hair", 0, (4, -4, -4), 0),
    ("blue_sky", 0, (-4, -4, 4), 0),
    ("miku_(vocaloid)", 4, (-3, -3, 3), 0),
    ("1girl", 0, (0, 0, 0), 2),
    ("^_^", 0, (1, -9, -9), 1.5),
    ("(o)_(o)", 0, (1, -9, -9), 0.5),
    ("half_white", 0, (0, 90, 0), -36),
    ("white_background", 0, (30, 30, 30), -75),
    ("explicit", 9, (9, 0, 0), 0),
    ("dim", 0, (-1, -1, -1), -1),
]


def save_tagger(folder, side=8, count="N", tags=TAGS):
    """A tagger of the wd family's form that looks at the mean colour alone."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = np.array([tag[2] for tag in tags], np.float32).reshape(-1, 3)
    # The model's channels are blue, green, red, from 0 to 255.
    weights = numpy_helper.from_array(np.ascontiguousarray(colours[:, ::-1].T / 255), "weights")
    bias = numpy_helper.from_array(np.array([tag[3] for tag in tags], np.float32), "bias")
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Sigmoid", ["sum"], ["output"]),
    ]
    taken = helper.make_tensor_value_info("input", TensorProto.FLOAT, [count, side, side, 3])
    given = helper.make_tensor_value_info("output", TensorProto.FLOAT, [count, len(tags)])
    graph = helper.make_graph(nodes, "tagger", [taken], [given], [weights, bias])
    # Versions that onnxruntime 1.17 knows too.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    with (folder / "selected_tags.csv").open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["tag_id", "name", "category", "count"])
        lines.writerows((number, name, category, 1) for number, (name, category, _, _) in enumerate(tags))
    return folder


if __name__ == "__main__":
    save_tagger(Path(sys.argv[1]))
