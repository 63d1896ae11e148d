package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/program"
	"github.com/landfall-dr/landfall/libs/telemetry"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/tools/allinone"
)

// The policy that a new state folder has.
const (
	defaultPolicy   = "default"
	defaultInterval = 30 * time.Second
)

// memoryLimit is the soft limit of `landfall up`, in bytes: six services in one process.
const memoryLimit = 200 << 20

// ackWait is how long after a kill the tasks that were in work come again: no worker dies alone in one process, so
// nobody is taken for dead who only works long.
const ackWait = 5 * time.Second

func (a *app) upCommand() *cobra.Command {
	o := allinone.Options{AckWait: ackWait}
	var format, trace, endpoint string
	var settings func() (backend.Settings, error)
	c := &cobra.Command{
		Use: "up {--images DIR | --qemu DIR}", Short: "Run the whole product in this process until interrupted", Args: cobra.NoArgs,
		Long: `Run the six services, an embedded event server and a store in one folder, in one
process. Certificates are made in the state folder, where the other commands find them.

With --images, DIR has one folder per machine, with vm.yaml and its disk images. Guests
reach the disks by NBD; ` + "`landfall vms show VM`" + ` prints where.

Lineages are kept in a folder of the state folder, or in the storage account that --store and
--config name (section store: its url and credentials).

With --qemu, DIR has the monitor socket of each QEMU machine, NAME.qmp, or a NAME.yaml
that says where it is; NAME.qga is its guest agent. A monitor serves one client: start
QEMU with one for Landfall alone, and with names for its disks' nodes.`,
		Example: "  landfall up --images /srv/vms\n  landfall up --images ./vms --state ./state --listen 127.0.0.1:7443\n  landfall up --qemu /run/machines",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			if err := machinesFolder(o); err != nil {
				return err
			}
			if err := wellNamed(o); err != nil {
				return err
			}
			var err error
			if o.Store, err = settings(); err != nil {
				return err
			}
			if err := failpoint.Arm(os.Getenv("LANDFALL_FAILPOINTS")); err != nil {
				return err
			}
			debug.SetMemoryLimit(memoryLimit)
			tel, err := telemetry.Setup(ctx, telemetry.Options{
				Service: "landfall", Version: program.Version, LogFormat: telemetry.Format(format), LogOutput: a.err,
				Exporter: telemetry.Exporter(trace), Endpoint: endpoint, SpanOutput: a.out,
			})
			if err != nil {
				return err
			}
			defer func() {
				flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
				defer cancel()
				_ = tel.Shutdown(flush)
			}()
			if o.State, err = filepath.Abs(a.state); err != nil {
				return err
			}
			o.Version, o.Clock, o.Logger, o.Tracer, o.Meter = program.Version, time.Now, tel.Logger, tel.TracerProvider, tel.MeterProvider
			o.OnReady = func(address string) {
				client := ClientConfig{Site: o.Site, Certificates: allinone.ClientCertificates, Endpoints: map[string]string{"scheduler": address, "failover-orchestrator": address}}
				if err := WriteClientConfig(o.State, client); err != nil {
					tel.Logger.Error("write client configuration", "error", err)
				}
				if err := a.firstPolicy(ctx); err != nil {
					tel.Logger.Warn("make policy default", "error", err)
				}
				fmt.Fprintf(a.out, "landfall is up: API %s, state %s\n", address, o.State)
			}
			err = allinone.Run(ctx, o)
			if err == nil || errors.Is(err, context.Canceled) && ctx.Err() != nil {
				return nil
			}
			return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, err, "landfall up")
		},
	}
	settings = storeFlags(c, "store", "where lineages are stored: https://ACCOUNT.blob.core.windows.net, or a folder (default: in the state folder)")
	f := c.Flags()
	f.StringVar(&o.Images, "images", "", "folder of machine folders")
	f.StringVar(&o.QEMU.Machines, "qemu", "", "folder of the QEMU machines' monitor sockets and definitions")
	f.StringVar(&o.QEMU.Scratch, "qemu-scratch", "", "folder of the frozen copies of QEMU machines' points (default: in the state folder)")
	f.StringVar(&o.QEMU.Sockets, "qemu-sockets", "", "folder of the sockets that points are read from, a short path (default: in the state folder)")
	f.StringVar(&o.Listen, "listen", "127.0.0.1:0", "address of the API")
	f.StringVar(&o.NBDListen, "nbd-listen", "127.0.0.1:0", "address at which guests find their disks: loopback, or unix:PATH")
	f.StringVar(&o.Site, "site", "local", "name of this site")
	f.StringVar(&o.Host, "host", "host-1", "name of this host")
	f.StringVar(&format, "log-format", "text", "text or json")
	f.StringVar(&trace, "trace", "none", "where spans go: none, stdout or otlp")
	f.StringVar(&endpoint, "trace-endpoint", "", "OTLP collector, for example http://127.0.0.1:4317")
	c.MarkFlagsOneRequired("images", "qemu")
	c.MarkFlagsMutuallyExclusive("images", "qemu")
	c.MarkFlagsMutuallyExclusive("images", "qemu-scratch")
	c.MarkFlagsMutuallyExclusive("images", "qemu-sockets")
	return c
}

// machinesFolder checks the one folder of machines that was named.
func machinesFolder(o allinone.Options) error {
	flag, folder := "--images", o.Images
	if folder == "" {
		flag, folder = "--qemu", o.QEMU.Machines
	}
	info, err := os.Stat(folder)
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, err, "%s", flag)
	}
	if !info.IsDir() {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "%s: %s is not a folder", flag, folder)
	}
	return nil
}

// token is a name that is part of events' subjects (docs/events.md).
var token = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$`)

// wellNamed checks the names and the address of this run before anything is made.
func wellNamed(o allinone.Options) error {
	for _, f := range []struct{ flag, value string }{{"--site", o.Site}, {"--host", o.Host}} {
		if !token.MatchString(f.value) {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "%s %q: it can be 1 to 64 of a-z, 0-9 and inner hyphens", f.flag, f.value)
		}
	}
	if _, _, err := net.SplitHostPort(o.Listen); err != nil {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "--listen %q: it must be ADDRESS:PORT, for example 127.0.0.1:7443", o.Listen)
	}
	return nil
}

// firstPolicy makes the policy that `landfall protect` uses unless told otherwise, where there is no policy at all.
func (a *app) firstPolicy(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	client, err := a.policies(ctx)
	if err != nil {
		return err
	}
	have, err := client.ListPolicies(ctx, &schedulerv1.ListPoliciesRequest{PageSize: 1})
	if err != nil || len(have.Policies) > 0 {
		return err
	}
	_, err = client.ApplyPolicy(ctx, &schedulerv1.ApplyPolicyRequest{Policy: &schedulerv1.Policy{
		Name: resource("policies", defaultPolicy), CopyInterval: durationpb.New(defaultInterval),
	}})
	return err
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Print the version", Args: cobra.NoArgs, Example: "  landfall version", RunE: func(*cobra.Command, []string) error {
		if a.format != "table" {
			return a.printValue(map[string]string{"version": program.Version})
		}
		fmt.Fprintln(a.out, program.Version)
		return nil
	}}
}
