// Command landfall is Landfall's command line, and with `landfall up` the
// whole product in one process.
package main

import (
	"context"
	"os"

	"github.com/landfall-dr/landfall/tools/cli"
)

func main() {
	os.Exit(cli.Main(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
