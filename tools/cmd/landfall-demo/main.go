// Command landfall-demo does the product's whole job once, for real, and
// checks every byte: `make demo`.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/landfall-dr/landfall/tools/demo"
)

func main() {
	keep := flag.Bool("keep", false, "leave everything running and print what to try next")
	dir := flag.String("dir", "", "folder to work in; empty makes a temporary one")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	self, err := os.Executable()
	if err == nil {
		err = demo.Run(ctx, demo.Options{Landfall: filepath.Join(filepath.Dir(self), "landfall"+filepath.Ext(self)), Dir: *dir, Keep: *keep, Out: os.Stdout})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo FAILED:", err)
		os.Exit(1)
	}
}
