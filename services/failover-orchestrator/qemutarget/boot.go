package qemutarget

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
)

// What proved that a machine is up.
const (
	proofAgent   = "guest-agent"
	proofConsole = "console-pattern"
	proofNone    = "none"
)

const (
	// grace is what a machine gets for its proof that was started so long ago that its time is over: the orchestrator may
	// have been away.
	grace = 10 * time.Second
	// reportEvery is how often progress is told.
	reportEvery = 5 * time.Second
	// evidenceTime bounds the collection of evidence.
	evidenceTime = 10 * time.Second
)

// Boot implements target.Target.
func (t *Target) Boot(ctx context.Context, p target.Plan, progress func(line string)) (*typesv1.BootEvidence, error) {
	f, err := vhdtarget.New(p.Dir, p.Failover)
	if err != nil {
		return nil, err
	}
	if err := f.Require(); err != nil {
		return nil, err
	}
	l, fw, err := t.able(p)
	if err != nil {
		return nil, err
	}
	started, err := t.up(ctx, f, p, l, fw)
	if err != nil {
		return nil, err
	}
	return t.await(ctx, machineOf(p), l, started, progress)
}

// up sees to it that the machine runs and answers when it was started.
func (t *Target) up(ctx context.Context, f *vhdtarget.Folder, p target.Plan, l layout, fw firmware) (time.Time, error) {
	m := machineOf(p)
	end := time.Now().Add(t.config.StartTimeout) //nolint:forbidigo // a process is waited for by the real clock
	for {
		var found error // why a machine that is there cannot be seen yet
		if alive, err := m.alive(); err != nil {
			return time.Time{}, m.trouble(err)
		} else if alive {
			found = m.tell(ctx, func(*monitor) error { return nil })
			// Somebody else may use the monitor, which then is silent.
			if found == nil || len(processes(m.id)) > 0 && errors.Is(found, os.ErrDeadlineExceeded) {
				if s, err := readState(p.Dir); err == nil {
					return s.Started, nil
				}
				return t.now(), nil
			}
		} else if started, err := t.start(ctx, f, p, l, fw); !errors.Is(err, errHeld) {
			return started, err
		}
		if time.Now().After(end) { //nolint:forbidigo // as above
			return time.Time{}, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, errors.Join(found, errHeld), "reach the machine of %s, which another process started or starts", p.Dir)
		}
		if err := pause(ctx, look); err != nil {
			return time.Time{}, err
		}
	}
}

// start starts the machine, unless somebody else has the lock.
func (t *Target) start(ctx context.Context, f *vhdtarget.Folder, p target.Plan, l layout, fw firmware) (time.Time, error) {
	if err := f.Require(); err != nil {
		return time.Time{}, err
	}
	lock, err := tryLock(p.Dir)
	if errors.Is(err, errHeld) {
		return time.Time{}, err
	}
	if err != nil {
		return time.Time{}, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "lock the folder")
	}
	defer lock.Close()
	if err := f.Require(); err != nil { // it may have been removed before the lock was ours
		return time.Time{}, err
	}
	program, err := lookUp(t.config.Program, systemPackage)
	if err != nil {
		return time.Time{}, err
	}
	if err := t.prepare(ctx, lock, f, p, l, fw); err != nil {
		return time.Time{}, err
	}
	started := t.now()
	return started, machineOf(p).launch(ctx, program, l.arguments(t.config, p, fw), lock, t.config.StartTimeout)
}

// await waits for the sign of life that the settings ask for and collects the evidence.
func (t *Target) await(ctx context.Context, m machine, l layout, started time.Time, progress func(string)) (*typesv1.BootEvidence, error) {
	limit := max(l.timeout-t.now().Sub(started), min(grace, l.timeout))
	waiting, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var agent chan error
	proof, awaited := proofNone, "nothing"
	switch {
	case l.noWait:
	case l.pattern != nil:
		proof, awaited = proofConsole, fmt.Sprintf("the console to show %q", l.pattern)
	default:
		proof, awaited = proofAgent, "the guest agent"
		agent = make(chan error, 1)
		go func() { agent <- awaitAgent(waiting, m.dir) }()
	}
	text := console{path: filepath.Join(m.dir, ConsoleFile)}
	next := time.Now() //nolint:forbidigo // how often is measured by the real clock
	for {
		seen, why := proof == proofNone, ""
		switch proof {
		case proofConsole:
			var err error
			if seen, err = text.find(l.pattern); err != nil {
				return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_TARGET_UNWRITABLE, err, "read the console")
			}
		case proofAgent:
			select {
			case err := <-agent:
				seen = err == nil
			default:
			}
		}
		if seen {
			seconds := t.now().Sub(started).Seconds()
			e := m.evidence(ctx)
			e.Proof, e.Seconds = proof, seconds
			return e, nil
		}
		if alive, err := m.alive(); err != nil {
			return nil, m.trouble(err)
		} else if !alive {
			why = fmt.Sprintf("the machine ended while the failover waited for %s: %s", awaited, complaint(filepath.Join(m.dir, logFile)))
		} else if waiting.Err() != nil && ctx.Err() == nil {
			why = fmt.Sprintf("waited %s for %s in vain; the machine is %s", l.timeout, awaited, m.state(ctx))
		}
		if why != "" {
			cancel()
			e := m.evidence(ctx)
			err := errcat.New(typesv1.ErrorReason_ERROR_REASON_TARGET_DID_NOT_BOOT, "%s; %s", why, lastWords(e)).With("console_file", e.ConsoleFile)
			if e.ScreenshotFile != "" {
				err = err.With("screenshot_file", e.ScreenshotFile)
			}
			e.Seconds = t.now().Sub(started).Seconds()
			return e, err
		}
		if progress != nil && time.Now().After(next) { //nolint:forbidigo // how often is measured by the real clock
			next = time.Now().Add(reportEvery) //nolint:forbidigo // how often is measured by the real clock
			progress(fmt.Sprintf("waiting for %s; %s", awaited, lastWords(&typesv1.BootEvidence{ConsoleTail: consoleTail(text.path)})))
		}
		if err := pause(waiting, look); err != nil && ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
}

func lastWords(e *typesv1.BootEvidence) string {
	if line := tail(lastLine(e.ConsoleTail), 200); line != "" {
		return fmt.Sprintf("the console's last line is %q", line)
	}
	return "the console is empty"
}

// state is the machine's run state for people.
func (m machine) state(ctx context.Context) (status string) {
	if err := m.tell(ctx, func(mon *monitor) (err error) { status, err = mon.status(ctx); return err }); err != nil {
		return fmt.Sprintf("silent (%v)", err)
	}
	return status
}

// evidence is what the machine shows of itself now.
func (m machine) evidence(ctx context.Context) *typesv1.BootEvidence {
	ctx, cancel := context.WithTimeout(ctx, evidenceTime)
	defer cancel()
	return &typesv1.BootEvidence{
		ConsoleTail: consoleTail(filepath.Join(m.dir, ConsoleFile)), ConsoleFile: ConsoleFile, ScreenshotFile: m.screenshot(ctx),
	}
}
