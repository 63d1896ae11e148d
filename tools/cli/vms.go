package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func (a *app) hostsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "hosts", Short: "List registered hosts", Args: cobra.NoArgs, Example: "  landfall hosts -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := a.call(cmd)
			defer cancel()
			c, err := a.protection(ctx)
			if err != nil {
				return err
			}
			r, err := c.ListHosts(ctx, &schedulerv1.ListHostsRequest{})
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) {
				row(w, "HOST", "DRIVER", "VMS", "HEARTBEAT", "VERSION")
				for _, h := range r.Hosts {
					row(w, last(h.Name), h.Driver, len(h.Vms), stamp(h.HeartbeatTime), h.Version)
				}
			})
		},
	}
}

func (a *app) vmsCommand() *cobra.Command {
	list := &cobra.Command{
		Use: "vms", Short: "List virtual machines and whether they are protected", Args: cobra.NoArgs,
		Example: "  landfall vms\n  landfall vms show web-01",
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := a.listVMs(cmd)
			if err != nil {
				return err
			}
			if err := a.print(r, func(w io.Writer) {
				row(w, "NAME", "ID", "HOST", "DISKS", "SIZE", "PROTECTION")
				for _, v := range r.Vms {
					row(w, v.Machine.DisplayName, v.Machine.Id, last(v.Machine.Host), len(v.Machine.Disks), human(totalSize(v.Machine)), stateLabel(v.State))
				}
			}); err != nil {
				return err
			}
			if a.format == "table" {
				for _, h := range r.UnreachableHosts {
					fmt.Fprintf(a.err, "host %s does not answer: its machines are not listed\n", last(h))
				}
				a.printFindings(r.Problems)
			}
			return nil
		},
	}
	show := &cobra.Command{
		Use: "show VM", Short: "Describe one machine and its disks", Args: cobra.ExactArgs(1), Example: "  landfall vms show web-01 -o yaml",
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := a.listVMs(cmd)
			if err != nil {
				return err
			}
			v, err := pick(r, args[0])
			if err != nil {
				a.printFindings(r.Problems) // it may be there and not be readable
				return err
			}
			return a.print(v, func(w io.Writer) {
				m := v.Machine
				row(w, "Name:", m.DisplayName)
				row(w, "Id:", m.Id)
				row(w, "Host:", last(m.Host))
				row(w, "Generation:", m.Generation)
				row(w, "CPUs:", m.Cpus)
				row(w, "Memory:", human(m.MemoryBytes))
				row(w, "Protection:", stateLabel(v.State))
				if m.PowerState != typesv1.PowerState_POWER_STATE_UNSPECIFIED {
					row(w, "Power:", label(m.PowerState, "POWER_STATE_"))
				}
				if m.Fence != "" {
					row(w, "Fenced by:", m.Fence)
				}
				for _, n := range m.NetworkAdapters {
					row(w, "Network:", n.Name+" "+n.MacAddress+" "+n.Network)
				}
				for _, d := range m.Disks {
					role := ""
					if d.OsDisk {
						role = " (OS)"
					}
					row(w, "Disk "+d.Id+role+":", fmt.Sprintf("%s, %s", human(d.SizeBytes), label(d.Format, "DISK_FORMAT_")))
					row(w, "  image:", d.Path)
					row(w, "  export:", d.ExportUri)
				}
			})
		},
	}
	list.AddCommand(show)
	return list
}

func (a *app) listVMs(cmd *cobra.Command) (*schedulerv1.ListVmsResponse, error) {
	ctx, cancel := a.call(cmd)
	defer cancel()
	c, err := a.protection(ctx)
	if err != nil {
		return nil, err
	}
	return c.ListVms(ctx, &schedulerv1.ListVmsRequest{})
}

func pick(r *schedulerv1.ListVmsResponse, name string) (*schedulerv1.VmSummary, error) {
	for _, v := range r.Vms {
		if v.Machine.Id == strings.ToLower(last(name)) || v.Machine.DisplayName == name {
			return v, nil
		}
	}
	return nil, notFound(name)
}

func totalSize(m *typesv1.Machine) (n int64) {
	for _, d := range m.Disks {
		n += d.SizeBytes
	}
	return n
}

// printFindings writes the findings of prerequisite checks to standard error.
func (a *app) printFindings(findings []*hostproviderv1.Finding) {
	for _, f := range findings {
		fmt.Fprintf(a.err, "%s: %s\n", label(f.Severity, "SEVERITY_"), f.What)
		if f.Action != "" {
			fmt.Fprintf(a.err, "  what to do: %s\n", f.Action)
		}
	}
}
