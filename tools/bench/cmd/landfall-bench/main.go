// Command landfall-bench measures the product beside its peers and checks every
// result: `make bench`.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/landfall-dr/landfall/tools/bench"
)

func main() {
	if err := suite(); err != nil {
		fmt.Fprintln(os.Stderr, "landfall-bench:", err)
		os.Exit(1)
	}
}

func suite() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if is, err := bench.Worker(ctx); is {
		return err
	}
	o := bench.Options{Set: "quick", Progress: os.Stderr}
	full := flag.Bool("full", false, "the reference disk of 4 GiB; without it 1 GiB")
	size := flag.Int64("size", 0, "size of the reference disk in MiB, instead of what the set says")
	only := flag.String("rows", "", "rows to run, with commas: "+strings.Join(bench.Names(), ", "))
	format := flag.String("o", "table", "table or json")
	flag.StringVar(&o.Root, "root", ".", "checkout, for the Go benchmarks")
	flag.StringVar(&o.Bin, "bin", "bin", "folder of the built programs")
	flag.StringVar(&o.Work, "work", filepath.Join(os.TempDir(), fmt.Sprintf("landfall-bench-%d", os.Getpid())), "folder to work in, removed at the end; the full set needs 15 GiB")
	flag.IntVar(&o.Runs, "runs", 3, "runs of each subject, whose medians are reported")
	flag.Uint64Var(&o.Seed, "seed", 20261122, "seed of every input")
	flag.Parse()
	if o.Size = 1 << 30; *full {
		o.Size, o.Set = 4<<30, "full"
	}
	if *size > 0 {
		o.Size, o.Set = *size<<20, fmt.Sprintf("%d MiB", *size)
	}
	if *only != "" {
		o.Rows = strings.Split(*only, ",")
	}
	if *format != "table" && *format != "json" {
		return fmt.Errorf("output format %q: table or json", *format)
	}
	report, err := bench.Run(ctx, o)
	if err != nil {
		return err
	}
	write := report.Table
	if *format == "json" {
		write = report.JSON
	}
	if err := write(os.Stdout); err != nil {
		return err
	}
	if failed := report.Failed(); len(failed) > 0 {
		return errors.New("these results failed:\n  " + strings.Join(failed, "\n  "))
	}
	return nil
}
