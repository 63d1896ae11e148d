// Command landfall-guest is everything that runs in the lab guest besides the
// kernel and the guest agent; see package inside.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/landfall-dr/landfall/tools/guest"
	"github.com/landfall-dr/landfall/tools/guest/inside"
)

const usage = "usage: landfall-guest verify | write SIZE [os|data] | latency DURATION [os|data] | rate STEPS-A-SECOND | writer | poweroff | reboot"

func main() {
	if err := run(filepath.Base(os.Args[0]), os.Args[1:]); err != nil {
		prefix := "landfall-guest: "
		if os.Getpid() == 1 {
			prefix = guest.FatalPrefix
		}
		fmt.Fprintln(os.Stderr, prefix+err.Error())
		os.Exit(1)
	}
}

func run(name string, args []string) error {
	switch {
	case os.Getpid() == 1 && os.Args[0] == "/init":
		return inside.Stage1()
	case os.Getpid() == 1:
		return inside.Init()
	case name == "shutdown" || name == "poweroff" || name == "halt":
		return inside.RequestPowerDown(slices.Contains(args, "-r"))
	case name == "reboot":
		return inside.RequestPowerDown(true)
	case len(args) == 0:
		return errors.New(usage)
	}
	disk := "data"
	if len(args) > 2 {
		disk = args[2]
	}
	switch {
	case args[0] == "writer":
		return write()
	case args[0] == "verify":
		report, err := inside.VerifyNow()
		if err != nil {
			return err
		}
		return print(report)
	case args[0] == "write" && len(args) > 1:
		bytes, err := guest.ParseSize(args[1])
		if err != nil {
			return err
		}
		load, err := inside.WriteLoad(disk, bytes)
		if err != nil {
			return err
		}
		return print(load)
	case args[0] == "latency" && len(args) > 1:
		during, err := time.ParseDuration(args[1])
		if err != nil {
			return err
		}
		latency, err := inside.MeasureLatency(disk, during)
		if err != nil {
			return err
		}
		return print(latency)
	case args[0] == "rate" && len(args) > 1:
		rate, err := strconv.Atoi(args[1])
		if err != nil {
			return fmt.Errorf("rate: %w", err)
		}
		if err := inside.SetRate(rate); err != nil {
			return err
		}
		return print(guest.Settings{Rate: rate})
	case args[0] == "poweroff", args[0] == "reboot":
		return inside.RequestPowerDown(args[0] == "reboot")
	}
	return errors.New(usage)
}

// write runs the writer with the rate of the image's settings, or of the second argument.
func write() error {
	settings := inside.ReadSettings()
	if len(os.Args) > 2 {
		rate, err := strconv.Atoi(os.Args[2])
		if err != nil {
			return fmt.Errorf("rate: %w", err)
		}
		settings.Rate = rate
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return inside.Write(ctx, settings.Rate)
}

func print(v any) error { return json.NewEncoder(os.Stdout).Encode(v) }
