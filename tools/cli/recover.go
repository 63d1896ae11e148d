package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/backend"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/qemutarget"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
	"github.com/landfall-dr/landfall/tools/recovery"
)

// recoverFlags are those of one recovery.
type recoverFlags struct {
	where                              targetFlags
	vm, lineage, point, plan, failover string
	takeOver, yes                      bool
	parallel, ranges                   int
	accelerator                        string
}

func (a *app) recoverCommand() *cobra.Command {
	var f recoverFlags
	c := &cobra.Command{
		Use: "recover --from-storage URL", Short: "Bring machines back from storage alone, with nothing else left", Args: cobra.NoArgs,
		Long: `Bring machines back from the storage account alone: no event server, host, scheduler or
state folder is needed, only credentials. Run it where the copies are to be.

Without more arguments it lists what the store holds. With --vm it lists a machine's
recovery points; with --out as well it writes the machine as it was at --point to a folder:
a fixed VHD for each disk, and vm.json. --target qemu also boots it. --plan does so for all
machines of a recovery plan, group after group, each in a folder below --out.

Rights to read and list are enough. Nothing is written to the store, so the point that is
read cannot be pinned: on a machine that is still replicated, retention may take an old point
away meanwhile (RETIRED; take a newer one).

--take-over first closes the lineage, which needs the right to create blobs in lfj-…: from
then on the old site can never commit again, whatever it does, and nothing is retired. It
does not stop the old machine: two may run at once if you do not see to that. To take the
store back to the old site afterwards, protect the machine anew.

A run that was interrupted goes on when it is repeated. What has a marker of another
recovery, or anything else in it, is never touched (TARGET_NOT_EMPTY).`,
		Example: `  landfall recover --from-storage https://ACCOUNT.blob.core.windows.net
  landfall recover --from-storage /mnt/store --vm web-01
  landfall recover --from-storage /mnt/store --vm web-01 --point latest --out /srv/web-01
  landfall recover --from-storage /mnt/store --vm web-01 --out /srv/web-01 --target qemu --take-over
  landfall recover --from-storage /mnt/store --plan everything --out /srv/recovered --take-over --yes`,
	}
	settings := storeFlags(c, "from-storage", "the store: https://ACCOUNT.blob.core.windows.net, or a folder")
	c.Flags().StringVar(&f.vm, "vm", "", "machine: name, id or sites/SITE/vms/ID")
	c.Flags().StringVar(&f.lineage, "lineage", "", "this lineage, where the machine has several; default the newest open one")
	c.Flags().StringVar(&f.point, "point", "latest", "latest, latest-processed, latest-app, or a point's number")
	c.Flags().StringVar(&f.plan, "plan", "", "recovery plan to follow")
	c.Flags().BoolVar(&f.takeOver, "take-over", false, "close the lineage first: the old site can never commit again")
	c.Flags().StringVar(&f.failover, "failover", "", "go on with the take-over of this id, as it was printed")
	c.Flags().BoolVar(&f.yes, "yes", false, "do not ask before taking over")
	c.Flags().IntVar(&f.parallel, "parallel", 4, "machines of a group brought up at once")
	c.Flags().IntVar(&f.ranges, "parallel-reads", 8, "ranges of a disk read at once")
	c.Flags().StringVar(&f.accelerator, "qemu-accelerator", qemutarget.Default().Accelerator, "target qemu: QEMU's -accel, for example kvm where it works")
	f.where.register(c)
	out := c.Flags().Lookup("out")
	out.Usage = "folder for the result, on this machine; empty or absent"
	delete(out.Annotations, cobra.BashCompOneRequiredFlag)
	c.Flags().Lookup("check").Usage = "check only: find the machine, the point and the folder, make and close nothing"
	_ = c.Flags().MarkHidden("wait") // it always waits
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := f.validate(cmd); err != nil {
			return &usageError{err, cmd.UsageString()}
		}
		s, err := settings()
		if err != nil {
			return err
		}
		store, err := openExisting(cmd.Context(), s)
		if err != nil {
			return err
		}
		defer store.Close()
		return a.recover(cmd, &f, store)
	}
	return c
}

// openExisting opens a store that must be there: a mistyped folder is not made.
func openExisting(ctx context.Context, s backend.Settings) (blobstore.Store, error) {
	if s.Kind() == backend.KindDir {
		dir := s.Dir
		if dir == "" {
			dir = strings.TrimPrefix(strings.TrimPrefix(s.URL, "dir://"), "file://")
		}
		if entries, err := os.ReadDir(dir); err != nil {
			return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_STORAGE_CONFIG_INVALID, err, "--from-storage")
		} else if len(entries) == 0 {
			return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_STORAGE_CONTAINER_MISSING, "--from-storage: folder %s is empty, it is no store of Landfall", dir)
		}
	}
	return openStore(ctx, s)
}

// validate checks what flags may stand together.
func (f *recoverFlags) validate(cmd *cobra.Command) error {
	given := func(name string) bool { return cmd.Flags().Changed(name) }
	switch {
	case f.plan != "" && (f.vm != "" || f.lineage != ""):
		return errors.New("--plan and --vm: one of them only")
	case f.plan != "" && f.where.out == "":
		return errors.New("--plan wants --out")
	case f.where.out != "" && f.vm == "" && f.lineage == "" && f.plan == "":
		return errors.New("--out wants --vm or --plan")
	case given("point") && f.where.out == "":
		return errors.New("--point wants --out")
	case f.takeOver && f.where.out == "":
		return errors.New("--take-over wants --out")
	case f.failover != "" && !f.takeOver:
		return errors.New("--failover wants --take-over")
	case f.parallel < 1 || f.parallel > 64, f.ranges < 1 || f.ranges > 64:
		return errors.New("--parallel and --parallel-reads can be 1 to 64")
	}
	selector, err := parsePoint(f.point)
	if err != nil {
		return err
	}
	if f.where.out != "" {
		if _, _, _, err := f.where.request(cmd); err != nil {
			var wrong *usageError
			if errors.As(err, &wrong) {
				return wrong.error
			}
			return err
		}
	}
	if _, number := selector.GetSelector().(*failoverv1.PointSelector_Ordinal); number && f.plan != "" {
		return errors.New("--plan with a point's number: machines do not share numbers; use latest, latest-processed or latest-app")
	}
	return nil
}

// session is the work on a store.
func (f *recoverFlags) session(store blobstore.Store) *recovery.Session {
	qemu := qemutarget.Default()
	qemu.Accelerator = f.accelerator
	host, _ := os.Hostname() // only for people who read the close
	targets := map[failoverv1.TargetKind]target.Target{}
	for _, t := range []target.Target{vhdtarget.Target{}, qemutarget.New(qemu, time.Now)} {
		targets[t.Kind()] = t
	}
	return recovery.New(recovery.Options{Store: store, Targets: targets, Parallel: f.parallel, Ranges: f.ranges, Host: host})
}

func (a *app) recover(cmd *cobra.Command, f *recoverFlags, store blobstore.Store) error {
	if err := failpoint.Arm(os.Getenv("LANDFALL_FAILPOINTS")); err != nil {
		return err
	}
	ctx, s := cmd.Context(), f.session(store)
	switch {
	case f.plan != "":
		return a.recoverPlan(cmd, f, s)
	case f.vm == "" && f.lineage == "":
		return a.recoverSurvey(ctx, s)
	}
	p, note, err := s.Find(ctx, f.vm, f.lineage)
	if err != nil {
		return err
	}
	if note != "" {
		fmt.Fprintln(a.err, note)
	}
	if f.where.out == "" {
		return a.recoverPoints(ctx, s, p)
	}
	return a.recoverOne(cmd, f, s, p)
}

// request is what the flags ask for, without the machine.
func (f *recoverFlags) request(cmd *cobra.Command) (recovery.Request, error) {
	kind, dir, settings, err := f.where.request(cmd)
	if err != nil {
		return recovery.Request{}, err
	}
	selector, err := parsePoint(f.point)
	req := recovery.Request{Point: selector, Dir: dir, Target: kind, Qemu: settings, TakeOver: f.takeOver, Check: f.where.check}
	if err == nil && f.takeOver {
		req.Failover, err = recovery.NewFailover(f.failover)
	}
	return req, err
}

func (a *app) recoverOne(cmd *cobra.Command, f *recoverFlags, s *recovery.Session, p *recovery.Protection) error {
	req, err := f.request(cmd)
	if err != nil {
		return err
	}
	req.Of = p
	if err := a.confirm(f, req, p.Title()); err != nil {
		return err
	}
	w := a.newRecoverProgress()
	res, err := s.Recover(cmd.Context(), req, w.update)
	w.close()
	if err != nil {
		a.goOn(req, err)
		return err
	}
	if req.Check {
		fmt.Fprintf(a.err, "nothing stands against it: point %d of %s would be written to %s\n", res.Point, res.CutTime.Format(time.RFC3339), req.Dir)
		return nil
	}
	return a.printDocument(res, func() { a.describeRecovery(res) })
}

func (a *app) recoverPlan(cmd *cobra.Command, f *recoverFlags, s *recovery.Session) error {
	req, err := f.request(cmd)
	if err != nil {
		return err
	}
	if err := a.confirm(f, req, f.plan); err != nil {
		return err
	}
	w := a.newRecoverProgress()
	outcomes, err := s.FollowPlan(cmd.Context(), recovery.PlanRequest{Request: req, Plan: f.plan}, w.update, w.note)
	w.close()
	if req.Check && err == nil {
		fmt.Fprintf(a.err, "nothing stands against it: %d machines would be written below %s\n", len(outcomes), req.Dir)
		return nil
	}
	if len(outcomes) > 0 {
		if perr := a.printDocument(map[string]any{"failover": req.Failover, "machines": outcomes}, func() { a.describePlanRecovery(outcomes) }); perr != nil {
			return perr
		}
	}
	if err != nil {
		a.goOn(req, err)
	}
	return err
}

// goOn says how to repeat a take-over that did not come to its end.
func (a *app) goOn(req recovery.Request, err error) {
	if req.TakeOver && !req.Check && !errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED) {
		fmt.Fprintf(a.err, "to go on, repeat the command with --failover %s\n", req.Failover)
	}
}

// confirm asks before a lineage is closed, and prints the id in whose name that is done, before it is done.
func (a *app) confirm(f *recoverFlags, req recovery.Request, name string) error {
	if !req.TakeOver || req.Check {
		return nil
	}
	in, ok := a.in.(*os.File)
	if !f.yes && (!ok || !term.IsTerminal(int(in.Fd()))) {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "--take-over closes %s to its old site and asks first; there is no terminal to ask at: add --yes", name)
	}
	fmt.Fprintf(a.err, "failover %s\n", req.Failover)
	fmt.Fprintln(a.err, "warning: the old machine may still run. Closing stops what it sends from counting, not the machine: see to it that it is off and stays off.")
	if f.yes {
		return nil
	}
	fmt.Fprintf(a.err, "type %s to close it to its old site: ", name)
	line, err := bufio.NewReader(in).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != name {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_CANCELLED, "not taken over: %q is not %q", strings.TrimSpace(line), name)
	}
	return nil
}

// printDocument writes a plain value in the chosen format; its members are those of its JSON form. table prints the table.
func (a *app) printDocument(v any, table func()) error {
	if a.format == "table" {
		table()
		return nil
	}
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode output: %w", err)
	}
	var plain any
	if err := json.Unmarshal(raw, &plain); err != nil {
		return fmt.Errorf("encode output: %w", err)
	}
	return a.printValue(plain)
}
