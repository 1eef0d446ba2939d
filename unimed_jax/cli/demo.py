"""`unimed-jax demo`: a web page on this machine that scores a picture and shows where the score comes from."""

from __future__ import annotations

from unimed_jax.cli.args import Parser
from unimed_jax.errors import UsageError


def _parser() -> Parser:
    parser = Parser(
        "unimed-jax demo",
        description="Serves a page on 127.0.0.1: a picture, DICOM or NIfTI file in, scores and a saliency map out. "
        "Nothing leaves this machine; uploads are deleted when it ends (Ctrl-C). Research use only.",
    )
    parser.add_argument("--model", required=True, metavar="M", help="model folder or run folder")
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument(
        "--labels", default="normal,abnormal", metavar="A,B", help="class names to begin with"
    )
    classes.add_argument("--task", default="", metavar="NAME", help="a built-in task to begin with")
    parser.add_argument(
        "--multilabel", action="store_true", help="the labels are findings that do not exclude each other"
    )
    parser.add_argument("--calibration", default="", metavar="FILE", help="from unimed-jax calibrate")
    parser.add_argument("--port", type=int, default=7860, help="0 for any free one")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation"
    )
    return parser


def run(argv: list[str]) -> int:
    """Serves until it is interrupted."""
    args = _parser().parse(argv)
    if not 0 <= args.port < 65536:
        raise UsageError(f"--port is {args.port}", "0 to 65535")
    from unimed_jax import demo
    from unimed_jax.evaluate import calibration

    demo.require()
    labels = [x.strip() for x in args.labels.split(",")]
    if args.multilabel and args.task:
        raise UsageError("--multilabel belongs to --labels", "a task says itself what it is")
    demo.question(
        args.task or demo.OWN, "\n".join(labels), "", args.multilabel
    )  # refused before the model is loaded
    calibrated = calibration.load(args.calibration) if args.calibration else None

    from unimed_jax import infer

    model = infer.load(args.model, batch_size=1, dtype=args.dtype)
    if calibrated is not None:
        calibrated.require(model.about)
    print(f"model   {model.describe()}")
    demo.serve(
        lambda: demo.build(
            demo.Desk(model, calibrated), labels=labels, task=args.task, several=args.multilabel
        ),
        port=args.port,
        ready=lambda address: print(
            f"page    {address}   (on this machine only; Ctrl-C ends it)", flush=True
        ),
    )
    return 0
