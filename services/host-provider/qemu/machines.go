package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/qmp"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/host-provider/qemu/inventory"
)

const mebibyte = 1 << 20

// Machines lists the machines that were described, by name, then id, and the problems of the others.
func (d *Driver) Machines(context.Context) ([]*typesv1.Machine, []*hostproviderv1.Finding, error) {
	problems, err := d.inv.Problems()
	if err != nil {
		return nil, nil, err
	}
	var out []*typesv1.Machine
	for _, m := range d.inv.All() {
		if m.Description != nil {
			out = append(out, d.describe(m))
		}
	}
	return out, problems, nil
}

// Machine finds one by GUID or unique display name. One that is here and was never described is refused with the reason.
func (d *Driver) Machine(_ context.Context, vm string) (*typesv1.Machine, error) {
	m, err := d.inv.Find(vm)
	if err != nil {
		return nil, err
	}
	return d.describe(m), nil
}

// describe adds what only the driver knows: the fence.
func (d *Driver) describe(m *inventory.Machine) *typesv1.Machine {
	out := proto.CloneOf(m.Description)
	out.Fence = d.fence(m.ID)
	return out
}

// Names of the checks that need more than a description.
const (
	checkMonitor = "monitor"
	checkExports = "nbd-server"
	checkAgent   = "guest-agent"
	checkScratch = "scratch"
	checkFence   = "fence"
	checkFrozen  = "frozen-copy"
	checkRecord  = "record"
	checkBlock   = "block-jobs"
)

// Check runs every check of a machine: definition, disks, QEMU's features, its NBD server, the guest agent, scratch space.
func (d *Driver) Check(ctx context.Context, vm string) ([]*hostproviderv1.Finding, *typesv1.Machine, error) {
	m, findings, answered, err := d.inv.Check(ctx, vm)
	if err != nil || m == nil {
		return findings, nil, err
	}
	c := &check{d: d, m: m, findings: findings}
	if answered {
		err = c.qemu(ctx)
		if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE) && ctx.Err() == nil {
			c.add(hostproviderv1.Severity_SEVERITY_ERROR, checkMonitor, errcat.Reason(err), "look at the machine: its QEMU stopped to answer during the checks", "%v", err)
			err = nil
		}
		if err != nil {
			return nil, nil, err
		}
		c.agent(ctx)
	}
	c.scratch()
	c.fence()
	return c.findings, d.describe(m), nil
}

// check collects the findings of one machine.
type check struct {
	d        *Driver
	m        *inventory.Machine
	findings []*hostproviderv1.Finding
}

func (c *check) add(severity hostproviderv1.Severity, name string, reason typesv1.ErrorReason, action, format string, args ...any) {
	c.findings = append(c.findings, &hostproviderv1.Finding{
		Check: name, Severity: severity, Reason: reason, What: c.m.Name + ": " + fmt.Sprintf(format, args...), Action: action,
	})
}

func (c *check) warn(name string, action, format string, args ...any) {
	c.add(hostproviderv1.Severity_SEVERITY_WARNING, name, typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED, action, format, args...)
}

// qemu checks what this QEMU can do, and who else works with it.
func (c *check) qemu(ctx context.Context) error {
	mon, err := c.d.pool.Get(ctx, c.m.QMPSocket)
	if err != nil {
		return err
	}
	schema, err := mon.Schema(ctx)
	if err != nil {
		return err
	}
	for _, command := range []string{"transaction", "block-dirty-bitmap-add", "block-dirty-bitmap-merge", "block-export-add", "nbd-server-start"} {
		if !schema.Command(command) {
			c.add(hostproviderv1.Severity_SEVERITY_ERROR, checkMonitor, typesv1.ErrorReason_ERROR_REASON_PREREQUISITES_NOT_MET,
				"run the machine with QEMU 5.2 or newer", "QEMU %s does not know %s", mon.Version(), command)
		}
	}
	if !schema.Command("set-action") {
		c.warn(checkMonitor, "run the machine with QEMU 6.0 or newer, or with -no-shutdown, before a planned failover",
			"QEMU %s ends with its guest: a planned failover loses what was written after the last point", mon.Version())
	}
	if !schema.BlockDriver("copy-before-write", "on-cbw-error") || !schema.BlockDriver("snapshot-access") {
		c.warn(checkFrozen, "run the machine with QEMU 7.1 or newer; until then give scratch space that cannot fill up",
			"QEMU %s cannot give up a frozen copy by itself: a full scratch folder stops the guest until Landfall continues it", mon.Version())
	}
	for _, k := range c.m.Disks {
		thread, err := iothread(ctx, mon, k.Device)
		if err != nil {
			return err
		}
		if thread != "" {
			c.add(hostproviderv1.Severity_SEVERITY_ERROR, checkExports, typesv1.ErrorReason_ERROR_REASON_PREREQUISITES_NOT_MET,
				fmt.Sprintf("run the machine with QEMU %d or newer, or the disk's device without iothread", safeIOThread),
				"disk %s is served by the iothread %s: QEMU %s would end, and the guest with it, when the disk is read", k.ID, thread, mon.Version())
		}
	}
	if err := c.exports(ctx, mon); err != nil {
		return err
	}
	return c.jobs(ctx, mon)
}

// exports looks for an NBD server that somebody else runs: QEMU has one only.
func (c *check) exports(ctx context.Context, mon *qmp.Monitor) error {
	var exports []struct {
		ID   string `json:"id"`
		Node string `json:"node-name"`
		Type string `json:"type"`
	}
	if err := mon.Execute(ctx, "query-block-exports", nil, &exports); err != nil {
		if qmp.Refused(err) { // too old for it: said above
			return nil
		}
		return err
	}
	mine := &held{d: c.d, vm: &vm{id: c.m.ID}}
	for _, e := range exports {
		if e.Type == "nbd" && !ours(e.ID) && !serverAnswers(mine.socketPath()) {
			c.add(hostproviderv1.Severity_SEVERITY_ERROR, checkExports, typesv1.ErrorReason_ERROR_REASON_SOURCE_EXPORT_INVALID,
				"end the other program's NBD export, then check again",
				"another program exports node %s by QEMU's only NBD server (export %s): points cannot be read while it does", e.Node, e.ID)
		}
	}
	return nil
}

// jobs looks for block jobs of others on the machine: they may change the nodes that are tracked.
func (c *check) jobs(ctx context.Context, mon *qmp.Monitor) error {
	var jobs []struct {
		Device string `json:"device"`
		Type   string `json:"type"`
	}
	if err := mon.Execute(ctx, "query-block-jobs", nil, &jobs); err != nil {
		if qmp.Refused(err) {
			return nil
		}
		return err
	}
	for _, j := range jobs {
		if !ours(j.Device) {
			c.warn(checkBlock, "let it end first; a job that replaces a disk's node costs a resynchronisation", "block job %s (%s) of another program runs", j.Device, j.Type)
		}
	}
	return nil
}

// agent asks the guest agent whether it can freeze. Without it points are as after a power cut.
func (c *check) agent(ctx context.Context) {
	const only = "points will be crash-consistent only"
	if c.m.AgentSocket == "" {
		c.warn(checkAgent, "run qemu-guest-agent in the guest and give QEMU its channel: -device virtserialport,name=org.qemu.guest_agent.0,chardev=...", "there is no guest agent's socket: %s", only)
		return
	}
	if c.m.Description.PowerState != typesv1.PowerState_POWER_STATE_RUNNING {
		c.add(hostproviderv1.Severity_SEVERITY_INFO, checkAgent, typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED, "check again when the guest runs", "the guest does not run, so its agent was not asked")
		return
	}
	a, err := qmp.DialAgent(ctx, c.m.AgentSocket)
	if err != nil {
		c.warn(checkAgent, "start qemu-guest-agent in the guest, or end the other program that uses its socket", "%v: %s", err, only)
		return
	}
	defer a.Close()
	var known struct {
		Commands []struct {
			Name    string `json:"name"`
			Enabled bool   `json:"enabled"`
		} `json:"supported_commands"`
	}
	if err := a.Execute(ctx, "guest-info", nil, &known); err != nil {
		c.warn(checkAgent, "look at qemu-guest-agent in the guest", "%v: %s", err, only)
		return
	}
	for _, want := range []string{"guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"} {
		if !slices.ContainsFunc(known.Commands, func(k struct {
			Name    string `json:"name"`
			Enabled bool   `json:"enabled"`
		}) bool {
			return k.Name == want && k.Enabled
		}) {
			c.warn(checkAgent, "allow "+want+" in the agent's configuration (--allow-rpcs or --block-rpcs)", "the guest agent does not offer %s: %s", want, only)
			return
		}
	}
}

// scratch checks the folder of frozen copies: it must take what the guest overwrites while a point is shipped.
func (c *check) scratch() {
	dir := c.m.ScratchDir
	if dir == "" {
		dir = c.d.cfg.ScratchDir
	}
	if err := writable(dir); err != nil {
		c.add(hostproviderv1.Severity_SEVERITY_ERROR, checkScratch, typesv1.ErrorReason_ERROR_REASON_LOW_DISK_SPACE,
			"make the folder writable for host-provider and QEMU, or name another one (host_provider.qemu.scratch_dir, or scratch in the definition)", "scratch folder: %v", err)
		return
	}
	free, err := freeSpace(dir)
	if err != nil {
		c.warn(checkScratch, "look at the folder's file system", "free space of the scratch folder: %v", err)
		return
	}
	var size int64
	for _, k := range c.m.Disks {
		size += k.Size
	}
	switch {
	case free < c.d.cfg.MinScratch:
		c.add(hostproviderv1.Severity_SEVERITY_ERROR, checkScratch, typesv1.ErrorReason_ERROR_REASON_LOW_DISK_SPACE,
			"free space, or name another folder (host_provider.qemu.scratch_dir, or scratch in the definition)", "scratch folder %s has %d MiB free, %d are needed for a point", dir, free/mebibyte, c.d.cfg.MinScratch/mebibyte)
	case free < size/10:
		c.add(hostproviderv1.Severity_SEVERITY_WARNING, checkScratch, typesv1.ErrorReason_ERROR_REASON_LOW_DISK_SPACE,
			"give it more: a point whose frozen copy does not fit is given up and taken again; the guest goes on", "scratch folder %s has %d MiB free for disks of %d MiB", dir, free/mebibyte, size/mebibyte)
	}
}

// writable makes the folder and a file in it.
func writable(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".check-*")
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

func (c *check) fence() {
	if f := c.d.fence(c.m.ID); f != "" {
		c.add(hostproviderv1.Severity_SEVERITY_ERROR, checkFence, typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED,
			"commit or cancel the failover", "the machine is fenced by %s", f)
	}
}
