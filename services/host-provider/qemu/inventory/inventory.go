package inventory

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/qmp"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const (
	// maxMachines bounds one host's folder.
	maxMachines = 1000
	// lookers is how many machines are asked at once: a silent one must not hold up the others.
	lookers = 8
	// lookTimeout is how long one machine may take to describe itself.
	lookTimeout = 5 * time.Second
)

// Options of an inventory. Folder, StateDir, Monitors, Site and Host must be given.
type Options struct {
	// Folder of definitions (NAME.yaml) and sockets (NAME.qmp, NAME.qga).
	Folder string
	// StateDir keeps machines as they were last seen.
	StateDir string
	// Monitors are the shared connections: a monitor serves one client.
	Monitors *qmp.Pool
	// Site and Host are the names of this site and host.
	Site, Host string
	Logger     *slog.Logger
	// Keep says whether a machine without a definition stays when its socket is gone, for example because it is
	// protected; nil keeps every one.
	Keep func(id string) bool
}

// Inventory is the machines of one host. Make it with [New]. It is safe for concurrent use.
type Inventory struct {
	o     Options
	store store

	looking sync.Mutex // one look at a time, so that an older one cannot overwrite a newer

	mu      sync.Mutex
	ready   bool // looked once: only then "not here" means something
	entries []*entry
	held    map[string]*Machine // as last seen sound, by label
}

// entry is one machine with all that was found out about it. It is not changed after it was installed.
type entry struct {
	def *Definition
	// machine is nil when nobody can tell who it is.
	machine  *Machine
	findings []*hostproviderv1.Finding
	// answered: QEMU described itself at the last look.
	answered bool
}

func (e *entry) add(f ...*hostproviderv1.Finding) { e.findings = append(e.findings, f...) }

// label names the machine for people.
func (e *entry) label() string {
	if e.machine != nil {
		return cmp.Or(e.machine.Name, e.def.Name, e.def.label)
	}
	return cmp.Or(e.def.Name, e.def.label)
}

// New opens what was seen before. It does not look yet.
func New(o Options) (*Inventory, error) {
	folder, err := filepath.Abs(o.Folder)
	if err != nil {
		return nil, fmt.Errorf("resolve folder of machines: %w", err)
	}
	info, err := os.Stat(folder)
	if err != nil {
		return nil, fmt.Errorf("folder of machines: %w", err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("folder of machines: %s is not a folder", folder)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	o.Folder = folder
	i := &Inventory{o: o, store: store{o.StateDir}}
	held, problems := i.store.load()
	for _, p := range problems {
		o.Logger.Warn("stored description is left out; the machine is described again when its QEMU answers", "error", p)
	}
	i.held = held
	return i, nil
}

// Refresh looks at every machine. An error means that the folder could not be read, or that there was no time.
func (i *Inventory) Refresh(ctx context.Context) error {
	i.looking.Lock()
	defer i.looking.Unlock()
	entries, err := i.scan()
	if err != nil {
		return err
	}
	group, _ := errgroup.WithContext(ctx)
	group.SetLimit(lookers)
	for _, e := range entries {
		group.Go(func() error {
			i.look(ctx, e)
			return nil
		})
	}
	_ = group.Wait()
	if ctx.Err() != nil {
		return fmt.Errorf("look at machines: %w", ctx.Err())
	}
	i.install(ctx, entries)
	return nil
}

// scan reads the folder: definitions, and monitors that no definition has. The caller holds looking.
func (i *Inventory) scan() ([]*entry, error) {
	files, err := os.ReadDir(i.o.Folder)
	if err != nil {
		return nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, err, "read folder of machines")
	}
	var entries []*entry
	defined := map[string]bool{}
	for _, f := range files {
		path := filepath.Join(i.o.Folder, f.Name())
		label, ok := cutSuffix(f.Name(), definitionSuffix)
		if f.IsDir() || !ok {
			if label, ok := cutSuffix(f.Name(), misnamedSuffix); ok && !f.IsDir() {
				e := &entry{def: &Definition{path: path, label: label}}
				e.refuse(fmt.Errorf("the file must be called %s%s", label, definitionSuffix))
				entries = append(entries, e)
			}
			continue
		}
		def, err := ReadDefinition(path)
		e := &entry{def: def}
		e.refuse(err)
		defined[resolved(def.QMP)], defined[filepath.Join(i.o.Folder, label+monitorSuffix)] = true, true
		entries = append(entries, e)
	}
	bare := map[string]bool{}
	for _, f := range files {
		if label, ok := cutSuffix(f.Name(), monitorSuffix); ok && !f.IsDir() {
			path := filepath.Join(i.o.Folder, f.Name())
			if !defined[path] && !defined[resolved(path)] {
				bare[label] = true
			}
		}
	}
	for label, m := range i.held { // a QEMU that ends takes its socket with it
		if !bare[label] && m.QMPSocket == filepath.Join(i.o.Folder, label+monitorSuffix) && !defined[m.QMPSocket] && (i.o.Keep == nil || i.o.Keep(m.ID)) {
			bare[label] = true
		}
	}
	for _, label := range slices.Sorted(maps.Keys(bare)) {
		def, err := bareDefinition(filepath.Join(i.o.Folder, label+monitorSuffix))
		e := &entry{def: def}
		e.refuse(err)
		entries = append(entries, e)
	}
	if len(entries) > maxMachines {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID, "%s holds %d machines, more than %d", i.o.Folder, len(entries), maxMachines)
	}
	i.refuseShared(entries)
	return entries, nil
}

// refuse turns the errors of a definition into findings.
func (e *entry) refuse(err error) {
	for _, p := range flatten(err) {
		e.add(failed(checkDefinition, typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID, fmt.Sprintf("%s: %v", e.def.path, p), "correct "+filepath.Base(e.def.path)))
	}
}

// refuseShared refuses machines that name one socket: nobody here knows whose it is.
func (i *Inventory) refuseShared(entries []*entry) {
	users := map[string][]*entry{}
	for _, e := range entries {
		for _, s := range []string{e.def.QMP, e.def.Agent} {
			if s != "" {
				users[resolved(s)] = append(users[resolved(s)], e)
			}
		}
	}
	for _, socket := range slices.Sorted(maps.Keys(users)) {
		for _, e := range users[socket] {
			for _, other := range users[socket] {
				if other != e {
					e.add(failed(checkDefinition, typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID,
						fmt.Sprintf("%s: socket %s is also that of %s", e.def.path, socket, other.def.path), "give each machine its own monitor and agent"))
				}
			}
		}
	}
}

// look asks one machine's QEMU. A machine whose definition is broken now is asked by its last good one: its points go on.
func (i *Inventory) look(ctx context.Context, e *entry) {
	i.mu.Lock()
	held := i.held[e.def.label]
	i.mu.Unlock()
	if held != nil && e.def.ID != "" && e.def.ID != held.ID {
		held = nil // another machine by the old one's name
	}
	def := e.def
	if hasErrors(e.findings) {
		if held == nil {
			e.machine = unseen(def, nil)
			return
		}
		def = definitionOf(held, e.def)
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	live, err := i.ask(ctx, def.QMP)
	if err != nil {
		e.add(i.silent(def, err))
		e.machine = quiet(def, held, err)
		return
	}
	e.answered = true
	m, findings := assemble(def, live, held, i.o.Site, i.o.Host)
	e.add(findings...)
	if err := problem(findings); err != nil {
		if held != nil && held.ID == m.ID {
			m = copied(held)
			m.Description.PowerState = PowerState(live.Status)
		}
		m.Problem = err
	}
	e.machine = m
}

func (i *Inventory) ask(ctx context.Context, socket string) (*Live, error) {
	m, err := i.o.Monitors.Get(ctx, socket)
	if err != nil {
		return nil, err
	}
	return Describe(ctx, m)
}

// silent is the finding of a monitor that does not answer. A machine that is off has none: only its prerequisites fail.
func (i *Inventory) silent(def *Definition, err error) *hostproviderv1.Finding {
	action := "start the machine with `-qmp unix:" + def.QMP + ",server=on,wait=off`, or correct qmp in its definition"
	if errors.Is(err, qmp.ErrInUse) {
		action = "give Landfall a monitor of its own: add another `-qmp unix:PATH,server=on,wait=off`; one monitor serves one client"
	}
	return failed(checkMonitor, typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE, fmt.Sprintf("%s: %v", cmp.Or(def.Name, def.label), err), action)
}

// quiet is a machine whose QEMU does not answer: as it was last seen, with what the definition says now.
func quiet(def *Definition, held *Machine, err error) *Machine {
	if held == nil {
		return unseen(def, err)
	}
	m := copied(held)
	m.QMPSocket, m.AgentSocket, m.ScratchDir, m.Start, m.StartDir = def.QMP, cmp.Or(def.Agent, held.AgentSocket), def.Scratch, def.Start, def.StartDir
	m.Description.PowerState = typesv1.PowerState_POWER_STATE_UNSPECIFIED
	return m
}

// unseen is a machine of which only the definition is known; nil when that does not say who it is.
func unseen(def *Definition, err error) *Machine {
	if def.ID == "" {
		return nil
	}
	return &Machine{
		ID: strings.ToLower(def.ID), Name: cmp.Or(def.Name, def.label), QMPSocket: def.QMP, AgentSocket: def.Agent, ScratchDir: def.Scratch,
		Start: def.Start, StartDir: def.StartDir, Problem: err,
	}
}

// definitionOf is the definition that a machine was last seen by.
func definitionOf(m *Machine, now *Definition) *Definition {
	d := &Definition{
		Version: DefinitionVersion, ID: m.ID, Name: m.Name, QMP: m.QMPSocket, Agent: m.AgentSocket, Scratch: m.ScratchDir, Start: m.Start,
		StartDir: m.StartDir, Generation: int(m.Description.Generation), path: now.path, label: now.label,
	}
	if m.Description.Firmware == typesv1.Firmware_FIRMWARE_UEFI {
		d.Firmware = "uefi"
	}
	for _, k := range m.Disks {
		d.Disks = append(d.Disks, DiskDefinition{ID: k.ID, Node: k.Node, OS: k.OSDisk})
	}
	return d
}

// copied copies a machine deep enough to change its fields and its description.
func copied(m *Machine) *Machine {
	c := *m
	c.Problem = nil
	c.Description = proto.CloneOf(m.Description)
	return &c
}

// still is a description without what changes from look to look.
func still(m *typesv1.Machine) *typesv1.Machine {
	m = proto.CloneOf(m)
	m.PowerState, m.Fence = typesv1.PowerState_POWER_STATE_UNSPECIFIED, ""
	return m
}

// install makes entries the inventory, and keeps what was seen. The caller holds looking.
func (i *Inventory) install(ctx context.Context, entries []*entry) {
	i.mu.Lock()
	before := i.held
	i.mu.Unlock()
	refuseTwins(entries, before)
	held := map[string]*Machine{}
	for _, e := range entries {
		label := e.def.label
		switch old := before[label]; {
		case e.answered && e.machine != nil && e.machine.Problem == nil && e.machine.Description != nil:
			held[label] = e.machine
			if err := i.store.save(label, e.machine); err != nil {
				i.o.Logger.WarnContext(ctx, "keep machine's description", "vm", e.machine.ID, "error", err)
			}
			if old == nil {
				i.o.Logger.InfoContext(ctx, "machine found", "vm", e.machine.ID, "name", e.machine.Name, "qmp", e.machine.QMPSocket)
			}
		case old != nil && (e.machine == nil || e.machine.ID == old.ID):
			held[label] = old
		}
	}
	for label, m := range before {
		if held[label] == nil {
			i.o.Logger.WarnContext(ctx, "machine is gone", "vm", m.ID, "name", m.Name)
			if err := i.store.remove(label); err != nil {
				i.o.Logger.WarnContext(ctx, "forget machine's description", "vm", m.ID, "error", err)
			}
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.ready, i.entries, i.held = true, entries, held
}

// refuseTwins finds machines of one id. Each says so; the one that was here before goes on, since its points do.
func refuseTwins(entries []*entry, before map[string]*Machine) {
	ids := map[string][]*entry{}
	for _, e := range entries {
		if e.machine != nil && e.machine.ID != "" {
			ids[e.machine.ID] = append(ids[e.machine.ID], e)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		group := ids[id]
		if len(group) < 2 {
			continue
		}
		var incumbents []*entry
		for _, e := range group {
			if old := before[e.def.label]; old != nil && old.ID == id {
				incumbents = append(incumbents, e)
			}
		}
		for _, e := range group {
			for _, other := range group {
				if other == e {
					continue
				}
				e.add(failed(checkID, typesv1.ErrorReason_ERROR_REASON_VM_DEFINITION_INVALID,
					fmt.Sprintf("%s: id %s is also that of %s", e.def.path, id, other.def.path), "give each machine its own id, or QEMU its own -uuid"))
			}
			if len(incumbents) != 1 || incumbents[0] != e {
				m := *e.machine
				m.Description, m.Problem = nil, problem(e.findings)
				e.machine = &m
			}
		}
	}
}

// cutSuffix is strings.CutSuffix for a name that has more than the suffix.
func cutSuffix(name, suffix string) (string, bool) {
	label, ok := strings.CutSuffix(name, suffix)
	return label, ok && label != "" && !strings.HasPrefix(label, ".")
}

// resolved is a path without links, as far as it exists.
func resolved(path string) string {
	if folder, err := filepath.EvalSymlinks(path); err == nil {
		return folder
	}
	if folder, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		return filepath.Join(folder, filepath.Base(path))
	}
	return filepath.Clean(path)
}

// flatten lists the errors of an errors.Join; none for nil.
func flatten(err error) []error {
	if err == nil {
		return nil
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	return []error{err}
}
