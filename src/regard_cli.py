"""The command `regard`: its arguments and help.

Standard library only, and outside the package: `import regard` loads PyTorch, and help, version and usage errors must
answer at once. What a verb does is imported when it runs, from the package's module of its name.
"""

import argparse
import importlib
import importlib.metadata
import os
import sys

EXIT_OK, EXIT_PARTIAL, EXIT_FAILED = 0, 1, 2
EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 130, 141  # as a shell reports SIGINT and SIGPIPE

DESCRIPTION = "Small vision models that say where they look."
EPILOG = """\
examples:
  regard read receipt.png                    print the text of one image
  regard read scans/ --json > scans.jsonl    a folder, one JSON object a line
  regard read scans/ --draw seen/            also draw each character where the model looked
  regard classify photo.jpg                  print what the image shows, with probabilities
  regard ask photo.jpg "what colour is it?"  answer questions about an image
  regard count photo.jpg cats                count objects, one by one
  regard predict --model my-model --dataset mine/ --output out/
                                             the same for any number of images, into Parquet files
  regard train my.yaml                       train a model; my.yaml names model, data and settings
  regard evaluate my-model --dataset mine/   measure a model on labelled images
  regard info my-model                       say what a model is and how good it was measured to be
  regard export my-model out/ --with-code    a folder that loads without regard
  regard push my-model OWNER/NAME            put a model on the Hub

`regard VERB --help` explains one verb."""

STREAMS_AND_CODES = """\
Results appear on standard output as soon as a batch is done; progress and errors go to standard error.

exit codes:
  0  every image was read
  1  some images could not be read: each is named with its reason, the others are done
  2  stopped: wrong arguments, no image found, no model, every image failed, or a result could not be written
"""

READ_EPILOG = (
    """\
output:
  one image     its text
  several       "==> PATH <==" and the text of each, as head(1) prints several files
  --json        one object a line: {"path", "text", "score", "characters": [{"character", "score", "box"}]};
                a box is [x0, y0, x1, y1] in pixels of the image, score a probability
  --csv         path, text, score, with a header line
"""
    + STREAMS_AND_CODES
    + """
examples:
  regard read label.jpg
  regard read photos/ --csv --output photos.csv
  regard read *.png --json | jq -r .text"""
)

CLASSIFY_EPILOG = (
    """\
output:
  one image     its classes, a line each, from the most probable down: "Ankle boot  93.1 %"
  several       "==> PATH <==" and the classes of each, as head(1) prints several files
  --json        one object a line: {"path", "labels": [{"label", "score"}]}, score a probability
  --csv         path, rank, label, score, with a header line; a row for each class
"""
    + STREAMS_AND_CODES
    + """
Any classifier that transformers' AutoModelForImageClassification loads will do; --draw needs a QAViT, and shows which
of its branches it relied on and where they looked.

examples:
  regard classify shoe.jpg --top-k 5
  regard classify photos/ --csv --output photos.csv
  regard classify photos/ --model runs/mine --draw seen/"""
)

ASK_EPILOG = (
    """\
The first argument is the image, or a folder of them; each of the others is a question, in quotes. However many there
are, each image is looked at once. The model knows the answers that it was trained on, and gives those that suit best.

output:
  one question  its answer: "red  93.1 %"
  several       each question, and under it its answer
  a folder      "==> PATH <==" and the answers of each image, as head(1) prints several files
  --json        one object a line: {"path", "questions": [{"question", "answers": [{"answer", "score"}]}]}, score a
                probability
  --csv         path, question, rank, answer, score, with a header line; a row for each answer
"""
    + STREAMS_AND_CODES
    + """
--draw shows, for each question, where each layer of the model looked, where all did, where of that it spoke for the
answer, and for which words.

examples:
  regard ask photo.jpg "what colour is the car?" --top-k 3
  regard ask photo.jpg "how many cars are there?" "is it raining?" --draw seen/
  regard ask photos/ "is there a car?" --csv --output cars.csv"""
)

COUNT_EPILOG = (
    """\
The first argument is the image, or a folder of them; each of the others is a category to count, such as cats or "red
apples". The model points at one object after the other until it finds none; its count is the number of its points.
However many categories there are, each image is looked at once. An image with more objects than the model counts at
once is cut into tiles, and these again.

output:
  a category    its name and its count: "cats: 7"; "at least 7" where objects may be left; "(about 12 at a glance)"
                follows where the model's estimate of the whole differs by more than 1, and more than a tenth
  a folder      "==> PATH <==" and the counts of each image, as head(1) prints several files
  --json        one object a line: {"path", "counts": [{"category", "count", "count_estimate", "agrees",
                "points": [{"x", "y", "score"}], "complete", "tiled"}]}; x and y in pixels of the image, score the
                probability that an object was left, before this one was counted
  --csv         path, category, count, count_estimate, complete, with a header line; a row for each category
"""
    + STREAMS_AND_CODES
    + """
--draw numbers the objects in the order they were counted, blue at first and red at last.

examples:
  regard count photo.jpg cats
  regard count photo.jpg "red apples" pears --draw seen/
  regard count photos/ cars --csv --output cars.csv"""
)

TRAIN_EPILOG = """\
CONFIG.yaml (or .json) holds settings by name, all optional; flags after it win over the file:
  model: image_text_slot            which model to train: image_text_slot reads, qavit classifies,
                                    query_conditioned_vqa answers questions, sequential_attention_counting counts
  preset: 5m                        its size; or init_from: FOLDER to go on from a checkpoint
  dataset: my-images/               your data, or a data set of the Hub; to read: a folder with images and
                                    metadata.jsonl or metadata.csv (file_name, text), or columns pixel_values and
                                    text, default: generated texts; to classify: a folder with one of images for
                                    each class; to answer: easy-vqa, scenes (generated), vqa-v2:FOLDER,
                                    clevr:FOLDER, or columns image, question and answers; to count: emoji
                                    (generated), fsc-147:FOLDER, a folder with points.jsonl, or columns image,
                                    category and points
  output_dir: runs/mine
  learning_rate: 3.0e-4             and every other argument of transformers' Trainer
  report_to: tensorboard            curves, and pictures of what it reads or answers while it learns
  resume_from_checkpoint: true      go on from the newest checkpoint in output_dir

`python -m regard.train --model qavit --help` lists every setting of a model with its default. On several devices or
machines:
  accelerate launch -m regard.train CONFIG.yaml

exit codes:
  0  done, now or before
  2  not begun: a setting, the data or the checkpoint is wrong
Any other: it broke off. With resume_from_checkpoint: true the same command goes on.

examples:
  regard train trainers/configs/image_text_slot_5m.yaml
  regard train trainers/configs/qavit_tiny_cifar100.yaml --dataset cifar-100:cifar-100-python.tar.gz
  regard train my.yaml --max_steps 100 --output_dir runs/try"""

EVALUATE_EPILOG = """\
Of a model that reads text, prints character accuracy, character error rate, exact match and length error, by tier and
by length of text. --dataset is a folder of images with metadata.jsonl or metadata.csv (columns file_name and text), or
a data set of the Hub (columns pixel_values and text).

Of a classifier, prints loss, top-1 and top-5 accuracy, and the time its network takes for a batch. It needs --dataset:
a folder FOLDER/CLASS/IMAGE or FOLDER/SPLIT/CLASS/IMAGE, fashion-mnist, cifar-10:PATH, cifar-100:PATH, or a data set of
the Hub. The data's classes must be among the model's, by name.

Of a model that answers questions, prints the accuracy, that of the same questions about another image and about none,
and how often it points at what is asked about and how much it looks there, by type of question. It needs --dataset:
easy-vqa, scenes, vqa-v2:FOLDER, clevr:FOLDER, or a folder or data set of the Hub with columns image, question, answers.

Of a model that counts, prints the errors of its counts, how far its points are from the objects, how often it stops
while objects are left, for each object counted, how many objects it counts twice, and how far its estimate at a glance
is from its count. It needs --dataset: emoji (generated scenes, a row for each kind), fsc-147:FOLDER, a folder of images
with points.jsonl, or a folder or data set of the Hub with columns image, category, points.

exit codes:
  0  measured; images that cannot be read are named and left out
  2  wrong arguments, no model, no data, not enough memory, or the result cannot be written

examples:
  regard evaluate image-text-slot-5m
  regard evaluate runs/mine --tiers line,noisy --images 200 --output results.json
  regard evaluate runs/mine --dataset my-images/ --split test
  regard evaluate qavit-tiny-fashion-mnist --dataset fashion-mnist
  regard evaluate query-conditioned-vqa-easy --dataset easy-vqa
  regard evaluate runs/mine --dataset emoji --images 200"""

PREDICT_EPILOG = """\
Does to every row of a data set what the model is for: reads the image, classifies it, answers the row's question, or
counts the row's category.
However many rows there are, they are read as they are needed, and images as they are used.

SOURCE:
  a folder      of images, which are searched; or one with metadata.jsonl or metadata.csv
  a file        of rows: .jsonl, .csv, .json or .parquet, with columns image (or file_name: a path from the file's
                folder, or an address), and for a model that answers, question; one that
                counts, category
  a data set    of the Hub, OWNER/NAME, or in a folder, as `datasets` reads it

DIR gets part-00000.parquet, part-00001.parquet, ..., each with the results of --shard-size rows. Columns:
  index, id     the row's number, from 0, and the path of its image, or what --columns id=... names
  text, score, characters      of a model that reads; characters: [{character, score, box}]
  labels        of a classifier: [{label, score}]
  question, answers            of a model that answers; answers: [{answer, score}]
  category, count, points, ... of a model that counts; points: [{x, y, score}]
  error         why there is no result, as of an image that cannot be read; null otherwise

A part appears when it is complete. Whatever ends a run, the same command goes on after the parts that are there, on any
number of processes, devices and machines; no row is lost or doubled. DIR/manifest.json holds the settings, and a run
with others is refused. To have a part done again, delete it. On several devices, or machines that share DIR:
  accelerate launch -m regard.predict --model MODEL --dataset SOURCE --output DIR

exit codes:
  0  every row has its result
  1  every row is done, some have an error instead of a result
  2  not all rows are done: wrong arguments, no model, no data, DIR belongs to other settings, or it broke off

examples:
  regard predict --model image-text-slot-5m --dataset scans/ --output texts/
  regard predict --model runs/answers --dataset asked.jsonl --columns image=photo --top-k 3 --output answers/
  accelerate launch --num_processes 8 -m regard.predict --model runs/photos --dataset me/photos --output labels/
  python -c "import datasets
  print(datasets.load_dataset('parquet', data_files='texts/*.parquet', split='train')[0]['text'])\""""

EXPORT_EPILOG = """\
DIR gets weights, configuration, processor, card and figures, byte for byte, and nothing else that lies in MODEL, such
as optimizer states. The names of the files appear on standard output.

--with-code adds exactly those files of regard that the model needs, so that whoever has transformers, but not regard,
loads it with trust_remote_code=True: AutoModel, AutoProcessor and pipeline then work as with regard. Where regard is
installed its own classes are used, and the code in DIR is not run.

--onnx adds ONNX graphs in float32, in DIR/onnx/ (needs `pip install "regard[onnx]"`):
  ImageTextSlot                read.onnx
  QAViT, as a classifier       classify.onnx
  QueryConditionedVQA          encode_image.onnx, answer.onnx
  SequentialAttentionCounting  encode_image.onnx, encode_category.onnx, and count_step.onnx for each object
Numbers of images, questions, words, objects and slots are free. Image sizes are fixed, to those of the configuration,
but the counter's, which are free: all images of a call are of one size. `regard.export_onnx.export_onnx` documents
inputs and outputs.

exit codes:
  0  done
  2  nothing was done: no such model, DIR is not empty or cannot be written, the model is not one of regard's, or
     packages are missing

examples:
  regard export image-text-slot-5m out/ --with-code
  python -c "from transformers import pipeline
  print(pipeline('text-recognition', model='out/', trust_remote_code=True)('receipt.png'))"
  regard export image-text-slot-5m out/ --onnx
  regard export OWNER/NAME here/             a copy of a Hub repository's model"""

CARD_EPILOG = """\
README.md in FOLDER gets, from evaluation.json, the metadata by which the Hub shows figures (model-index), and the
table between the lines `<!-- figures -->` and `<!-- end of figures -->`; all else that you wrote there stays. Where
there is no README.md yet, one is made, with what `regard train` left in FOLDER: settings, steps and validation.

exit codes:
  0  done; the card's path appears on standard output
  2  nothing was done: FOLDER holds no model, evaluation.json is damaged, or FOLDER cannot be written

examples:
  regard evaluate runs/mine --dataset my-photos --output runs/mine/evaluation.json
  regard card runs/mine --license apache-2.0"""

PUSH_EPILOG = """\
The repository is made if it is not there, public unless --private. It gets what `regard export MODEL DIR` would write,
as one commit, and so the graphs that `regard export --onnx` has left in MODEL/onnx/; other files in it stay. If the
upload breaks off, the repository is as before: repeat the command.

You need a token that may write: `hf auth login` once, or the environment variable HF_TOKEN. The address of the commit
appears on standard output; `from_pretrained("OWNER/NAME", revision=COMMIT)` always loads these very weights.

exit codes:
  0  done
  2  nothing was pushed: no such model, no token or one that may not write, no network, or a refusal of the Hub

examples:
  regard push runs/mine me/receipts --private
  regard push runs/mine me/receipts --with-code --message "Longer training"
  regard push runs/mine me/receipts --revision candidate"""

INFO_EPILOG = """\
Prints what the model is and what was measured of it: its figures are those of evaluation.json, which
`regard evaluate MODEL --output evaluation.json` writes, or else of its card. Of a Hub repository only configuration,
card and figures are downloaded.

exit codes:
  0  done
  2  no such model, or it cannot be loaded

examples:
  regard info image-text-slot-5m
  regard info runs/mine
  regard info OWNER/NAME"""


def positive(text: str) -> int:
    """An argument that must be a whole number above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def question(text: str) -> str:
    """A question, which must say something."""
    return _say_something(text, "a question is empty; ask something, such as 'what colour is it?'")


def category(text: str) -> str:
    """A category, which must say something."""
    return _say_something(text, "a category is empty; name what to count, such as 'cats'")


def _say_something(text: str, otherwise: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(otherwise)
    if any("\ud800" <= character <= "\udfff" for character in text):  # how Python marks bytes that are not
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8; set the terminal to it")
    return text


def column(text: str) -> tuple[str, str]:
    """An argument NAME=OWN."""
    name, equals, own = text.partition("=")
    if not (name and equals and own):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=OWN, such as image=photo")
    return name, own


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sets `run`, the "module:function" that does it and returns the exit code."""
    parser = argparse.ArgumentParser(
        "regard", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=_Version)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add_verb(name: str, run: str, summary: str, epilog: str, **options) -> argparse.ArgumentParser:
        verb = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        verb.set_defaults(run=run)
        return verb

    def add_images(verb: argparse.ArgumentParser, draw: str, several: bool = True):
        images = "image files or addresses" if several else "an image file or address"
        verb.add_argument(
            "images", nargs="+" if several else 1, metavar="IMAGE|FOLDER", help=f"{images}; folders are searched"
        )
        verb.add_argument(
            "--model",
            metavar="PATH_OR_REPO",
            help="a folder, a bundled model, or a Hub repository OWNER/NAME (default: the bundled one for this)",
        )
        form = verb.add_mutually_exclusive_group()
        form.add_argument("--json", dest="form", action="store_const", const="json", help="JSON Lines")
        form.add_argument("--csv", dest="form", action="store_const", const="csv", help="comma-separated values")
        verb.set_defaults(form="text")
        verb.add_argument("--output", metavar="FILE", help="write the results to FILE instead of standard output")
        verb.add_argument("--draw", metavar="DIR", help=draw)

    def add_computing(verb: argparse.ArgumentParser, batch_size: int):
        verb.add_argument(
            "--batch-size", type=positive, default=batch_size, metavar="N",
            help=f"images at a time (default: {batch_size}); halved as often as memory demands",
        )  # fmt: skip
        verb.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: an accelerator if there is one)")
        verb.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: PyTorch's choice)")

    read = add_verb("read", "regard.read:run", "read the text of images", READ_EPILOG)
    add_images(read, "save each image to DIR with its characters where the model looked")
    add_computing(read, 16)
    read.add_argument(
        "--bf16", action="store_true",
        help="compute in bfloat16: a third faster where the hardware does (lscpu shows avx512_bf16), else far slower",
    )  # fmt: skip

    classify = add_verb("classify", "regard.classify:run", "say what images show", CLASSIFY_EPILOG)
    add_images(classify, "save each image to DIR with its classes and where the model looked")
    classify.add_argument(
        "--top-k", type=positive, default=3, metavar="N", help="classes to tell, from the most probable (default: 3)"
    )
    add_computing(classify, 32)

    ask = add_verb("ask", "regard.ask:run", "answer questions about images", ASK_EPILOG)
    add_images(ask, "save each image to DIR with its answers and where the model looked", several=False)
    ask.add_argument("questions", nargs="+", type=question, metavar="QUESTION", help="what to ask of each image")
    ask.add_argument(
        "--top-k", type=positive, default=1, metavar="N", help="answers to tell, from the most probable (default: 1)"
    )
    add_computing(ask, 16)

    count = add_verb("count", "regard.count:run", "count objects in images", COUNT_EPILOG)
    add_images(count, "save each image to DIR with the objects numbered", several=False)
    count.add_argument("categories", nargs="+", type=category, metavar="CATEGORY", help="what to count in each image")
    add_computing(count, 16)

    predict = add_verb("predict", "regard.predict:run", "run a model on a whole data set", PREDICT_EPILOG)
    predict.add_argument(
        "--model", required=True, metavar="MODEL", help="a folder, a Hub repository or the name of a bundled model"
    )
    predict.add_argument(
        "--dataset", required=True, metavar="SOURCE", help="a folder, a file, or a data set of the Hub"
    )
    predict.add_argument(
        "--output", required=True, metavar="DIR", help="a folder of this run's own, new or to go on with"
    )
    predict.add_argument("--split", help="which part of the data set (default: the only one)")
    predict.add_argument("--config", metavar="NAME", help="which configuration of a data set of the Hub")
    predict.add_argument(
        "--columns", type=column, nargs="+", metavar="NAME=OWN",
        help="the data's own names of image, id and question, such as image=photo",
    )  # fmt: skip
    predict.add_argument(
        "--top-k", type=positive, metavar="N", help="classes or answers to tell (default: 5 classes, 1 answer)"
    )
    predict.add_argument("--shard-size", type=positive, default=1000, metavar="N", help="rows a part (default: 1000)")
    add_computing(predict, 32)

    train = add_verb(
        "train",
        "regard.train:run",
        "train a model",
        TRAIN_EPILOG,
        usage="regard train [CONFIG.yaml] [--SETTING VALUE ...]",
    )
    train.add_argument("settings", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)

    evaluate = add_verb("evaluate", "regard.evaluate:run", "measure a model on labelled images", EVALUATE_EPILOG)
    evaluate.add_argument("model", metavar="MODEL", help="a folder, a Hub repository or the name of a bundled model")
    data = evaluate.add_mutually_exclusive_group()
    data.add_argument("--tiers", help="generated texts, comma-separated (default: line,block,dense,noisy)")
    data.add_argument(
        "--dataset", metavar="PATH", help="your data: folder or Hub data set of images and texts, classes, ..."
    )
    evaluate.add_argument("--split", help="which part of the data (default: test, but all of your own texts)")
    evaluate.add_argument(
        "--images",
        type=positive,
        metavar="N",
        help="at most so many images (default: 1000 a tier of texts, 200 a kind of scenes, or all)",
    )
    evaluate.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of generated texts and scenes, of the choice by --images of yours, and of a validation split held out "
        "where the model's training does not tell (default: 0)",
    )
    evaluate.add_argument("--output", metavar="FILE", help="write figures, versions and machine to FILE as JSON")
    add_computing(evaluate, 32)

    model_help = "a folder, a Hub repository or the name of a bundled model"
    info = add_verb("info", "regard.info:run", "say what a model is", INFO_EPILOG)
    info.add_argument("model", metavar="MODEL", help=model_help)

    export = add_verb("export", "regard.export:run", "copy a model, also with its code", EXPORT_EPILOG)
    export.add_argument("model", metavar="MODEL", help=model_help)
    export.add_argument("folder", metavar="DIR", help="a new or empty folder")
    code_help = "add the code that loads the model without regard"
    export.add_argument("--with-code", action="store_true", help=code_help)
    export.add_argument("--onnx", action="store_true", help="add ONNX graphs, which onnxruntime runs")

    card = add_verb("card", "regard.card:run", "make a model's card, or renew its figures", CARD_EPILOG)
    card.add_argument("folder", metavar="FOLDER", help="with the model")
    card.add_argument("--license", metavar="NAME", help="of the weights, as the Hub names it, such as apache-2.0")

    push = add_verb("push", "regard.push:run", "put a model on the Hugging Face Hub", PUSH_EPILOG)
    push.add_argument("model", metavar="MODEL", help=model_help)
    push.add_argument("repository", metavar="OWNER/NAME", help="a repository of yours on the Hub")
    push.add_argument("--private", action="store_true", help="only you, or your organization, may see it")
    push.add_argument("--with-code", action="store_true", help=code_help)
    push.add_argument("--revision", metavar="BRANCH", help="push to this branch (default: main)")
    push.add_argument("--message", metavar="TEXT", help='of the commit (default: "Upload MODEL with regard")')
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit")

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"regard {importlib.metadata.version('regard')}")
        parser.exit(EXIT_OK)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code; `--help`, `--version` and usage errors raise SystemExit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if arguments[:1] == ["train"] and not {"-h", "--help"} & set(arguments):
        # Its flags are those of the Trainer: regard.train knows and checks them.
        options = parser.parse_args(["train"])
        options.settings = arguments[1:]
        if not options.settings:
            parser.error("train: name a CONFIG.yaml or give settings, as in `regard train --output_dir runs/mine`")
    else:
        options = parser.parse_args(arguments)
    module, function = options.run.split(":")
    try:
        return getattr(importlib.import_module(module), function)(options)
    except KeyboardInterrupt:
        print("regard: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return EXIT_CLOSED_PIPE


if __name__ == "__main__":
    sys.exit(main())
