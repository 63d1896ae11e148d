// Command landfall-guest-image builds the lab guest's two disks into a folder.
//
//	go run ./tools/guest/cmd/landfall-guest-image -out /tmp/guest -format vhdx
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/landfall-dr/landfall/tools/guest/image"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	o := image.Default()
	flag.StringVar(&o.Out, "out", "", "folder that gets the disks")
	flag.StringVar(&o.Cache, "cache", o.Cache, "folder that keeps packages")
	flag.StringVar(&o.Program, "program", "", "a landfall-guest that is built already")
	osMiB := flag.Int64("os-mib", o.OSBytes>>20, "size of the OS disk in MiB")
	dataMiB := flag.Int64("data-mib", o.DataBytes>>20, "size of the data disk in MiB")
	flag.IntVar(&o.Settings.Rate, "rate", o.Settings.Rate, "steps a second of the writer; 0 as many as it can, negative none")
	flag.StringVar(&o.KernelArgs, "kernel-args", "", "added to the kernel command line")
	format := flag.String("format", "raw", "raw, vhdx, qcow2 or vpc")
	flag.Parse()
	o.OSBytes, o.DataBytes = *osMiB<<20, *dataMiB<<20
	img, err := image.Build(ctx, o)
	if err != nil {
		return err
	}
	for _, raw := range []string{img.OS, img.Data} {
		to := raw
		if *format != "raw" {
			to = filepath.Join(o.Out, filepath.Base(raw[:len(raw)-len("raw")])+*format)
			if err := image.Convert(ctx, raw, to, image.Format(*format)); err != nil {
				return err
			}
		}
		fmt.Println(to)
	}
	return nil
}
