package inside

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/tools/guest"
	"github.com/landfall-dr/landfall/tools/guest/filering"
	"github.com/landfall-dr/landfall/tools/guest/ledger"
)

// VerifyNow verifies while the writer stands between two steps, and prints the line on the console too.
func VerifyNow() (guest.Report, error) {
	b, err := os.ReadFile(bootStatePath)
	if err != nil {
		return guest.Report{}, fmt.Errorf("verify: %w", err)
	}
	var state bootState
	if err := json.Unmarshal(b, &state); err != nil {
		return guest.Report{}, fmt.Errorf("verify: %w", err)
	}
	var report guest.Report
	err = atRest(func() error {
		report = Verify(state)
		line, err := report.Line()
		if err == nil {
			say(line)
		}
		return err
	})
	return report, err
}

// Verify checks the ledger and every file of both disks. Nothing may write meanwhile.
func Verify(state bootState) guest.Report {
	began := time.Now()
	r := guest.Report{}
	if b, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		r.Boot = strings.TrimSpace(string(b))
	}
	r.JournalReplayed = guest.PerDisk[bool]{OS: state.OS.Replay, Data: state.Data.Replay}
	r.FSErrors = guest.PerDisk[uint32]{OS: state.OS.ErrCount, Data: state.Data.ErrCount}
	for disk, n := range map[string]uint32{"OS": r.FSErrors.OS, "data": r.FSErrors.Data} {
		if n > 0 {
			r.AddBad(fmt.Sprintf("the %s disk's superblock counts %d errors", disk, n))
		}
	}
	if state.Problem != "" {
		r.AddBad(state.Problem)
	} else {
		verifyDisks(&r)
	}
	r.OK = len(r.Bad) == 0
	r.TookMS = time.Since(began).Milliseconds()
	return r
}

func verifyDisks(r *guest.Report) {
	intent, errI := readSide(osFolder, ledger.Intent)
	commit, errC := readSide(dataFolder, ledger.Commit)
	noI, noC := errors.Is(errI, fs.ErrNotExist), errors.Is(errC, fs.ErrNotExist)
	switch {
	case noI && noC:
		r.Fresh = true
		return
	case noC && errI == nil && intent.Top == 0 && len(intent.Bad) == 0:
		// It stopped between making the one and the other.
		r.Fresh, r.Ledger = true, intent.ID.String()
		return
	}
	for _, err := range []error{errI, errC} {
		if err != nil {
			r.AddBad(err.Error())
		}
	}
	if errI != nil || errC != nil {
		return
	}
	r.Ledger, r.Intent, r.Commit = intent.ID.String(), intent.Top, commit.Top
	r.AddBad(intent.Bad...)
	r.AddBad(commit.Bad...)
	r.AddBad(ledger.Compare(intent, commit)...)

	done := commit.Top / filesEvery
	inFlight := intent.Top == commit.Top+1 && intent.Top%filesEvery == 0
	for _, d := range []struct {
		name, dir string
		ring      filering.Ring
	}{{"os", osFolder, osRing(intent.ID)}, {"data", dataFolder, dataRing(intent.ID)}} {
		n, bad, err := d.ring.Verify(filepath.Join(d.dir, filesName), done, inFlight)
		addFiles(r, d.name, n, bad, err)
		n, bad, err = filering.VerifyLoose(filepath.Join(d.dir, loadName))
		addFiles(r, d.name, n, bad, err)
	}
}

func addFiles(r *guest.Report, disk string, n int, bad []string, err error) {
	r.Files += n
	for _, b := range bad {
		r.AddBad(disk + ": " + b)
	}
	if err != nil {
		r.AddBad(disk + ": " + err.Error())
	}
}

func readSide(dir string, side ledger.Side) (ledger.State, error) {
	f, err := os.Open(filepath.Join(dir, ledgerName))
	if err != nil {
		return ledger.State{}, err
	}
	defer f.Close()
	return ledger.Read(f, side)
}
