package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Spread is the median of a figure over the runs, with its least and largest.
type Spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func spread(v []float64) Spread {
	if len(v) == 0 {
		return Spread{}
	}
	v = slices.Sorted(slices.Values(v))
	m := v[len(v)/2]
	if len(v)%2 == 0 {
		m = (m + v[len(v)/2-1]) / 2
	}
	return Spread{Median: m, Min: v[0], Max: v[len(v)-1]}
}

// Figure is one figure that a row is about.
type Figure struct {
	Name  string `json:"name"`
	Unit  string `json:"unit"`
	Value Spread `json:"value"`
	// Goal in words, when there is one, and whether the median reaches it.
	Goal string `json:"goal,omitempty"`
	Met  *bool  `json:"met,omitempty"`
}

// Row is what one subject, the product or a peer, did with one input.
type Row struct {
	Name    string `json:"name"`
	Subject string `json:"subject"`
	// Missing says why nothing was measured; empty when it was.
	Missing string `json:"missing,omitempty"`
	Runs    int    `json:"runs"`
	// Wall, CPU and System (the kernel's part of CPU) are in seconds, Peak in bytes (0: not measured here), In and
	// Out in bytes.
	Wall   Spread `json:"wall_seconds"`
	CPU    Spread `json:"cpu_seconds"`
	System Spread `json:"system_seconds"`
	Peak   Spread `json:"peak_bytes"`
	In     int64  `json:"bytes_in"`
	Out    int64  `json:"bytes_out"`
	// Check says how the result was checked; Failed says what was wrong with it.
	Check   string   `json:"check"`
	Failed  string   `json:"failed,omitempty"`
	Figures []Figure `json:"figures,omitempty"`
}

// Report is what a suite found.
type Report struct {
	Version   int       `json:"v"`
	Time      time.Time `json:"time"`
	Set       string    `json:"set"`
	Processor string    `json:"processor"`
	Cores     int       `json:"cores"`
	Go        string    `json:"go"`
	// LoadBefore and LoadAfter are the machine's one-minute load: of a busy machine only ratios, processor time,
	// bytes and memory count.
	LoadBefore string `json:"load_before"`
	LoadAfter  string `json:"load_after"`
	// Scale lets others compare their machine, in MB per second of one core.
	Scale map[string]float64 `json:"scale"`
	Rows  []Row              `json:"rows"`
}

// Failed lists the rows whose result was wrong or could not be had.
func (r *Report) Failed() []string {
	var list []string
	for _, row := range r.Rows {
		if row.Failed != "" {
			list = append(list, fmt.Sprintf("%s, %s: %s", row.Name, row.Subject, row.Failed))
		}
	}
	return list
}

// JSON writes the report for programs.
func (r *Report) JSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(r)
}

// Table writes the report for people.
func (r *Report) Table(w io.Writer) error {
	fmt.Fprintf(w, "%s set, %s, %d cores, %s, load %s before and %s after\n", r.Set, r.Processor, r.Cores, r.Go, r.LoadBefore, r.LoadAfter)
	var scale []string
	for name, v := range r.Scale {
		scale = append(scale, fmt.Sprintf("%s %.0f", name, v))
	}
	slices.Sort(scale)
	fmt.Fprintf(w, "one core, MB/s: %s\n\n", strings.Join(scale, ", "))
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "ROW\tSUBJECT\tRUNS\tWALL s\tCPU s\tSYS s\tPEAK MiB\tIN MB\tOUT MB\tCHECK")
	for _, row := range r.Rows {
		if row.Missing != "" {
			fmt.Fprintf(t, "%s\t%s\t-\t-\t-\t-\t-\t-\t-\tMISSING: %s\n", row.Name, row.Subject, row.Missing)
			continue
		}
		check := row.Check
		if row.Failed != "" {
			check = "FAILED: " + row.Failed
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%.2f\t%.2f\t%s\t%s\t%s\t%s\n", row.Name, row.Subject, row.Runs, between(row.Wall), row.CPU.Median, row.System.Median,
			known(row.Peak.Median/mib), known(float64(row.In)/1e6), known(float64(row.Out)/1e6), check)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	t = tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "ROW\tSUBJECT\tFIGURE\tVALUE\tSPREAD\tUNIT\tGOAL")
	for _, row := range r.Rows {
		for _, f := range row.Figures {
			goal := f.Goal
			if f.Met != nil && *f.Met {
				goal += "  met"
			} else if f.Met != nil {
				goal += "  NOT MET"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%.4g\t%.4g-%.4g\t%s\t%s\n", row.Name, row.Subject, f.Name, f.Value.Median, f.Value.Min, f.Value.Max, f.Unit, goal)
		}
	}
	return t.Flush()
}

func between(s Spread) string {
	if s.Min == s.Max {
		return fmt.Sprintf("%.2f", s.Median)
	}
	return fmt.Sprintf("%.2f [%.2f-%.2f]", s.Median, s.Min, s.Max)
}

func known(v float64) string {
	if v == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f", v)
}

func newReport(ctx context.Context, o *Options) *Report {
	return &Report{Version: 1, Time: time.Now().UTC(), Set: o.Set, Processor: processorName(), Cores: runtime.NumCPU(), Go: runtime.Version(), LoadBefore: loadAverage(), Scale: scale(ctx, o)}
}
