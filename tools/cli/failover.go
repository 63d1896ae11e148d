package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func (a *app) failoverCommand() *cobra.Command {
	return group("failover", "Bring machines up at the recovery site",
		a.testFailoverCommand(), a.cleanUpCommand(), a.plannedFailoverCommand(), a.unplannedFailoverCommand(),
		a.commitFailoverCommand(), a.cancelFailoverCommand(), a.listFailoversCommand())
}

// targetFlags say where and how a copy comes up.
type targetFlags struct {
	target, out, boot, network, pattern string
	memoryMiB                           int64
	cpus                                int32
	timeout                             time.Duration
	noBootWait, wait, check             bool
}

func (f *targetFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.target, "target", "vhd", "recovery target: vhd (a folder of fixed VHDs), qemu (a machine that boots from them)")
	c.Flags().StringVar(&f.out, "out", "", "folder for the result, on the machine of the failover-orchestrator; empty or absent")
	c.Flags().StringVar(&f.boot, "boot", "auto", "target qemu: auto (as the machine's firmware says), bios, uefi, generation-1")
	c.Flags().StringVar(&f.network, "network", "isolated", "target qemu: isolated, or user (the guest reaches out, nothing reaches it)")
	c.Flags().StringVar(&f.pattern, "console-pattern", "", "target qemu: wait until the serial console shows this regular expression, not for the guest agent")
	c.Flags().DurationVar(&f.timeout, "boot-timeout", 5*time.Minute, "target qemu: how long to wait for a sign of life")
	c.Flags().BoolVar(&f.noBootWait, "no-boot-wait", false, "target qemu: do not wait for a sign of life")
	c.Flags().Int64Var(&f.memoryMiB, "memory-mib", 0, "target qemu: memory in MiB; default the machine's")
	c.Flags().Int32Var(&f.cpus, "cpus", 0, "target qemu: virtual processors; default the machine's")
	c.Flags().BoolVar(&f.wait, "wait", false, "wait for the job, with progress")
	c.Flags().BoolVar(&f.check, "check", false, "check only")
	_ = c.MarkFlagRequired("out")
}

// qemuOnly are the flags that mean nothing to another target.
var qemuOnly = []string{"boot", "network", "console-pattern", "boot-timeout", "no-boot-wait", "memory-mib", "cpus"}

// maxMemoryMiB is 16 TiB: more than any host has.
const maxMemoryMiB = 16 << 20

// request is what the flags ask for.
func (f *targetFlags) request(cmd *cobra.Command) (kind failoverv1.TargetKind, dir string, settings *failoverv1.QemuTarget, err error) {
	wrong := func(format string, args ...any) error {
		return &usageError{fmt.Errorf(format, args...), cmd.UsageString()}
	}
	if dir, err = filepath.Abs(f.out); err != nil {
		return 0, "", nil, err
	}
	switch f.target {
	case "vhd":
		for _, name := range qemuOnly {
			if cmd.Flags().Changed(name) {
				return 0, "", nil, wrong("--%s means nothing to target vhd: add --target qemu", name)
			}
		}
		return failoverv1.TargetKind_TARGET_KIND_VHD, dir, nil, nil
	case "qemu":
	default:
		return 0, "", nil, wrong("target %q: there are vhd and qemu", f.target)
	}
	settings = &failoverv1.QemuTarget{
		ConsolePattern: f.pattern, NoWait: f.noBootWait, BootTimeoutSeconds: int32(f.timeout / time.Second), Cpus: f.cpus,
	}
	boot, ok := map[string]failoverv1.BootMode{
		"auto": failoverv1.BootMode_BOOT_MODE_UNSPECIFIED, "bios": failoverv1.BootMode_BOOT_MODE_BIOS,
		"uefi": failoverv1.BootMode_BOOT_MODE_UEFI, "generation-1": failoverv1.BootMode_BOOT_MODE_GENERATION_1,
	}[f.boot]
	if !ok {
		return 0, "", nil, wrong("boot %q: there are auto, bios, uefi and generation-1", f.boot)
	}
	network, ok := map[string]failoverv1.TargetNetwork{
		"isolated": failoverv1.TargetNetwork_TARGET_NETWORK_ISOLATED, "user": failoverv1.TargetNetwork_TARGET_NETWORK_USER,
	}[f.network]
	if !ok {
		return 0, "", nil, wrong("network %q: there are isolated and user", f.network)
	}
	settings.Boot, settings.Network = boot, network
	if f.timeout < time.Second || f.timeout > time.Hour {
		return 0, "", nil, wrong("--boot-timeout %s: it can be 1s to 1h", f.timeout)
	}
	if f.memoryMiB < 0 || f.memoryMiB > maxMemoryMiB {
		return 0, "", nil, wrong("--memory-mib %d: it can be 1 to %d", f.memoryMiB, maxMemoryMiB)
	}
	settings.MemoryBytes = f.memoryMiB << 20
	return failoverv1.TargetKind_TARGET_KIND_QEMU, dir, settings, nil
}

// followFailover is followJob; who waits sees the failover at rest afterwards, also when the job failed.
func (a *app) followFailover(cmd *cobra.Command, client failoverv1.FailoverServiceClient, j *typesv1.Job, wait bool) error {
	err := a.followJob(cmd.Context(), j, wait)
	if !wait || err != nil && (!errors.Is(err, errSilent) || cmd.Context().Err() != nil) {
		return err
	}
	return cmp.Or(err, a.settled(cmd, func(ctx context.Context) (bool, error) {
		r, err := client.ListFailovers(ctx, &failoverv1.ListFailoversRequest{Vm: j.Target, PageSize: 1000})
		return !slices.ContainsFunc(r.GetFailovers(), func(f *failoverv1.Failover) bool {
			return f.State == typesv1.TestFailoverState_TEST_FAILOVER_STATE_STARTING || f.State == typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANING_UP ||
				slices.Contains(moving, f.Phase)
		}), err
	}))
}

// moving are the phases that are not at rest.
var moving = []failoverv1.FailoverPhase{
	failoverv1.FailoverPhase_FAILOVER_PHASE_STARTING, failoverv1.FailoverPhase_FAILOVER_PHASE_COMMITTING,
	failoverv1.FailoverPhase_FAILOVER_PHASE_CANCELLING,
}

func parsePoint(s string) (*failoverv1.PointSelector, error) {
	switch s {
	case "latest":
		return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_Latest{Latest: true}}, nil
	case "latest-processed":
		return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_LatestProcessed{LatestProcessed: true}}, nil
	case "latest-app":
		return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_LatestApp{LatestApp: true}}, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n == 0 {
		return nil, fmt.Errorf("point %q is not latest, latest-processed, latest-app or a number", s)
	}
	return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_Ordinal{Ordinal: n}}, nil
}

func (a *app) listFailoversCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list [VM]", Short: "List failovers, newest first", Args: cobra.MaximumNArgs(1), Example: "  landfall failover list",
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &failoverv1.ListFailoversRequest{PageSize: 1000}
			if len(args) == 1 {
				req.Vm = a.vmName(args[0])
			}
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.failovers(ctx)
			if err != nil {
				return err
			}
			r, err := client.ListFailovers(ctx, req)
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) {
				row(w, "FAILOVER", "VM", "KIND", "STATE", "POINT", "OF", "FOLDER")
				for _, f := range r.Failovers {
					row(w, last(f.Name), last(f.Vm), kindLabel(f.Kind), failoverLabel(f), f.Point, stamp(f.CutTime), f.OutDir)
				}
			})
		},
	}
}

// failoverLabel says in words where a failover is, and why a copy that waits for a person has an error.
func failoverLabel(f *failoverv1.Failover) string {
	if waits := f.Phase == failoverv1.FailoverPhase_FAILOVER_PHASE_WAITING_COMMIT || f.State == typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP; waits && f.Error != nil {
		return restLabel(f) + " (" + f.Error.Reason + ")"
	}
	return restLabel(f)
}

// restLabel says in words where a failover is; a test without a copy any more has been cleaned up.
func restLabel(f *failoverv1.Failover) string {
	if f.Phase != failoverv1.FailoverPhase_FAILOVER_PHASE_UNSPECIFIED {
		return label(f.Phase, "FAILOVER_PHASE_")
	}
	if f.State == typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE {
		return "cleaned up"
	}
	return label(f.State, "TEST_FAILOVER_STATE_")
}

func kindLabel(k failoverv1.FailoverKind) string {
	if k == failoverv1.FailoverKind_FAILOVER_KIND_UNSPECIFIED {
		k = failoverv1.FailoverKind_FAILOVER_KIND_TEST // written before there were others
	}
	return label(k, "FAILOVER_KIND_")
}
